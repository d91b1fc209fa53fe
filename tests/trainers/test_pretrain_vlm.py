"""The job that makes the small VLM: its questions, its packed rows, a short training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mmalign.shapes import COLORS, SHAPES, ObjectSpec, PromptSpec, parse, split_of
from mmalign.shapes.splits import held_out_pair
from trainers.pretrain import vlm as job
from trainers.pretrain.vlm import LayoutHead, VLMConfig, answer_loss, layout_loss, train_vlm
from trainers.pretrain.vlm_accuracy import decision
from trainers.pretrain.vlm_judge import ALL_ASKERS, JUDGE_KINDS, compare_as_judge, written_rubric
from trainers.pretrain.vlm_model import VLMSize, build_model, build_processor, build_tokenizer
from trainers.pretrain.vlm_pictures import (
    HELD_OUT_COLORS,
    Picture,
    recolour,
    render_pictures,
    spoil,
)
from trainers.pretrain.vlm_questions import (
    KINDS,
    ask,
    holds,
    pick_spec,
    points,
    statements,
    verdict_on,
)
from trainers.pretrain.vlm_rows import (
    Row,
    RowSource,
    collate,
    picture_layouts,
    picture_pixels,
    random_training_spec,
)
from trainers.pretrain.vlm_words import corpus
from vision_rewards.judge.auto_rubric import read_criteria, read_verdicts
from vision_rewards.judge.backend import Reply
from vision_rewards.judge.critique import read_critique
from vision_rewards.judge.parsing import json_object
from vision_rewards.judge.rubric import load_rubric
from vision_rewards.judge.unified_reward import (
    read_axes,
    read_overall,
    read_rank,
    read_shares,
    read_think,
)

SIZE = VLMSize(vision_width=32, vision_layers=1, vision_ffn=64, width=32, layers=2, ffn=64)
RED_STAR = PromptSpec((ObjectSpec("star", "red"),))


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor(build_tokenizer(*corpus(400)), SIZE)


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    rng = random.Random(3)
    return render_pictures([random_training_spec(rng) for _ in range(60)], rng)


def one(spec: PromptSpec, seed: int = 0) -> Picture:
    return render_pictures([spec], random.Random(seed), "test")[0]


# --- questions ------------------------------------------------------------------------------


def test_training_questions_name_no_held_out_composition(pictures: list[Picture]) -> None:
    rng = random.Random(0)
    for picture in pictures:
        for _ in range(6):
            spec = pick_spec(picture, rng, "train")
            assert spec is not None
            assert spec.task == "single_object" or split_of(spec) == "train"
        text = ALL_ASKERS["exists"](picture, rng, "train")
        words = "" if text is None else text.text
        named = [(c, s) for c in COLORS for s in SHAPES if f"{c} {s}" in words]
        assert not any(held_out_pair(p) for p in named)


def test_captions_are_true_half_of_the_time(pictures: list[Picture]) -> None:
    rng = random.Random(1)
    chosen = [(p, pick_spec(p, rng, "train")) for p in pictures for _ in range(8)]
    true = [verdict_on(p, s).strict for p, s in chosen if s is not None]
    assert 0.42 < sum(true) / len(true) < 0.58


def test_answers_about_a_known_scene() -> None:
    spec = PromptSpec((ObjectSpec("star", "red"), ObjectSpec("circle", "blue")), "above")
    picture, rng = one(spec), random.Random(0)
    for _ in range(40):
        q = ask(picture, rng, "test", KINDS)
        if q.kind == "colour":
            assert q.answer == ("red" if "star" in q.text else "blue")
        if q.kind == "shape":
            assert q.answer == ("star" if "red" in q.text else "circle")
        if q.kind == "count" and "objects are" in q.text and "How many objects" in q.text:
            assert q.answer == "2"
        if q.kind == "where" and "above or below" in q.text:
            assert q.answer == ("above" if q.text.startswith("Is the star") else "below")
    assert all(holds(picture, spec))
    wrong = PromptSpec((ObjectSpec("star", "blue"), ObjectSpec("circle", "blue")), "below")
    false = [s for s, ok in zip(statements(wrong), holds(picture, wrong), strict=True) if not ok]
    assert false == ["The star is blue.", "The star is below the circle."]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (RED_STAR, 5),
        (PromptSpec((ObjectSpec("star", "blue"),)), 4),
        (PromptSpec((ObjectSpec("circle", "red"),)), 3),
        (PromptSpec((ObjectSpec("star", "red", 3),)), 2),
    ],
)
def test_points_fall_with_each_fault(asked: PromptSpec, expected: int) -> None:
    assert points(verdict_on(one(RED_STAR), asked)) == expected


def test_recoloured_pictures_teach_shapes_and_no_colours(pictures: list[Picture]) -> None:
    rng = random.Random(8)
    changed = [recolour(p, rng) for p in pictures]
    layouts = picture_layouts(changed)
    assert torch.isnan(layouts[..., len(SHAPES) :]).all()
    original = np.stack([p.layout for p in pictures if p.layout is not None])
    shapes = torch.from_numpy(original[..., : len(SHAPES)]).float() / 255
    assert torch.equal(layouts[..., : len(SHAPES)], shapes)
    same = [np.array_equal(a.pixels, b.pixels) for a, b in zip(changed, pictures, strict=True)]
    assert sum(same) < 0.2 * len(same)


def test_colours_of_held_out_pairs_teach_no_shape() -> None:
    color = HELD_OUT_COLORS[0]
    allowed = next(s for s in SHAPES if not held_out_pair((color, s)))
    other = next(c for c in COLORS if c not in HELD_OUT_COLORS)
    for name, known in ((color, False), (other, True)):
        layout = picture_layouts([one(PromptSpec((ObjectSpec(allowed, name),)))])[0]
        covered = layout[..., len(SHAPES) :].sum(-1) > 0
        assert torch.isfinite(layout[covered]).all() == known


def test_a_spoiled_caption_is_another_caption() -> None:
    rng = random.Random(0)
    specs = [random_training_spec(rng) for _ in range(200)]
    assert all(spoil(s, rng) != s for s in specs)


def test_judges_can_read_the_answers_that_are_taught(pictures: list[Picture]) -> None:
    rng = random.Random(2)
    readers = {
        "judge_overall": read_overall,
        "judge_axes": read_axes,
        "judge_critique": read_critique,
        "judge_rank": read_rank,
        "judge_pair_score": read_shares,
        "judge_pair_think": read_think,
    }
    for kind, name in (("judge_default", "default"), ("judge_shapes", "shapes")):
        rubric = load_rubric(name)
        readers[kind] = lambda r, rubric=rubric: rubric.read(json_object(r.text))
    alignment = load_rubric("alignment")
    readers["judge_alignment"] = lambda r: alignment.read(json_object(r.text))
    asked = [ask(p, rng, "train", JUDGE_KINDS, ALL_ASKERS) for p in pictures for _ in range(6)]
    for kind in ("judge_rank", "judge_pair_score", "judge_pair_think"):
        compared = (compare_as_judge(kind, *pictures[i : i + 2], p.spec)
                    for i, p in enumerate(pictures[:-1]))  # fmt: skip
        asked += [q for q in compared if q is not None]
    for q in asked:
        if q.kind == "judge_met":
            count = len(json.loads(q.answer)["verdicts"])
            assert count >= 3 and len(read_verdicts(Reply(text=q.answer), count)) == count
        elif q.kind in readers:
            readers[q.kind](Reply(text=q.answer))
    assert {q.kind for q in asked} > set(readers)


@pytest.mark.parametrize("text", ["a photo of a star", "a photo of two red circles"])
def test_written_rubrics_are_usable(text: str) -> None:
    assert len(read_criteria(Reply(text=written_rubric(parse(text)).answer))) >= 3


def test_decisions_ignore_how_a_reason_is_worded() -> None:
    said = '{"match": {"reason": "star is %s", "score": 3}}'
    assert decision(said % "blue") == decision(said % "odd") == ("3",)
    assert decision("Reason: x. Score: 2") != decision("Reason: x. Score: 3")
    assert decision("Image 1") == ("Image 1",)


# --- model and rows -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5]}', "Größe 日本\n  red  stars", "<prompt>x</prompt>"]
)
def test_decoding_gives_back_the_text(processor: Any, text: str) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_instructions_cost_few_tokens(processor: Any, pictures: list[Picture]) -> None:
    rng = random.Random(4)
    for kind in JUDGE_KINDS:
        question = next(q for p in pictures if (q := ALL_ASKERS[kind](p, rng, "train")))
        assert len(processor.tokenizer(question.text).input_ids) < 80, kind


def test_a_question_in_a_packed_row_is_answered_as_if_alone(
    processor: Any, pictures: list[Picture]
) -> None:
    model = build_model(SIZE, processor.tokenizer, 1).eval()
    rng = random.Random(5)
    asked = tuple(ask(pictures[0], rng, "train", KINDS) for _ in range(3))
    batch = collate([Row((pictures[0],), asked), Row(tuple(pictures[1:3]), asked)], processor)
    with torch.no_grad():
        packed = model(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions,
            pixel_values=batch.pixels,
        ).logits  # fmt: skip
        content = [{"type": "image"}, {"type": "text", "text": asked[1].text}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(
            images=[Image.fromarray(pictures[0].pixels)], text=[chat], return_tensors="pt"
        )
        alone = model(**inputs).logits
    answers = [i for i in range(1, batch.ids.shape[1]) if batch.weights[0, i] > 0]
    first = processor.tokenizer(asked[0].answer).input_ids
    at = answers[len(first) + 1]  # the first token of the second answer, behind the end of the one
    assert batch.ids[0, at] == processor.tokenizer(asked[1].answer).input_ids[0]
    torch.testing.assert_close(packed[0, at - 1], alone[0, -1], rtol=1e-4, atol=1e-4)


def test_the_loss_counts_answers_only(processor: Any, pictures: list[Picture]) -> None:
    asked = (ask(pictures[0], random.Random(6), "train", {"colour": 1, "describe": 1}),)
    batch = collate([Row((pictures[0],), asked)], processor)
    counted = batch.ids[0][batch.weights[0] > 0]
    end = [processor.tokenizer.eos_token_id]
    assert counted.tolist() == processor.tokenizer(asked[0].answer).input_ids + end


# --- training -------------------------------------------------------------------------------


def config(out: Path, **changes: Any) -> VLMConfig:
    cheap = {"steps": 3, "vision_steps": 2, "rows": 5, "vision_rows": 4, "generated": 0}
    return VLMConfig(out=str(out), save_every=2, **{**cheap, **changes})


@pytest.fixture
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "corpus", lambda: corpus(100))


def losses_of(model: Any, dials: VLMConfig, steps: int, loss_at: Any) -> list[float]:
    head = LayoutHead(model.model.vision_tower)
    optimizer = job.make_optimizer(model, head, dials)
    losses = []
    for step in range(steps):
        loss = loss_at(head, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_short_training_learns_to_answer(processor: Any, tmp_path: Path) -> None:
    model = build_model(SIZE, processor.tokenizer)
    dials = config(tmp_path, rows=8, muon_lr=1e-2, adam_lr=1e-2)
    source = RowSource(dials, [])

    def loss_at(head: LayoutHead, step: int) -> torch.Tensor:
        rows = source.rows(step, lambda q: len(processor.tokenizer(q.text).input_ids))
        return answer_loss(model, collate(rows, processor))[0]

    losses = losses_of(model, dials, 25, loss_at)
    assert losses[-1] < 0.5 * losses[0]


def test_a_short_training_learns_to_see(processor: Any, tmp_path: Path) -> None:
    model = build_model(SIZE, processor.tokenizer)
    dials = config(tmp_path, muon_lr=1e-2, adam_lr=1e-2)
    pictures = RowSource(dials, []).vision(0, 32)
    batch = picture_pixels(pictures), picture_layouts(pictures)
    losses = losses_of(model, dials, 25, lambda head, step: layout_loss(model, head, batch))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.usefixtures("small_vocabulary")
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_vlm(config(tmp_path / "whole"), SIZE)
    original = RowSource.rows

    def rows(self: RowSource, step: int, tokens: Any) -> Any:
        if step >= 4:
            raise KeyboardInterrupt
        return original(self, step, tokens)

    monkeypatch.setattr(RowSource, "rows", rows)
    with pytest.raises(KeyboardInterrupt):
        train_vlm(config(tmp_path / "stopped"), SIZE)
    monkeypatch.setattr(RowSource, "rows", original)
    resumed = train_vlm(config(tmp_path / "stopped"), SIZE)
    files = [next(f.glob("*.safetensors")).read_bytes() for f in (whole, resumed)]
    assert files[0] == files[1]


@pytest.mark.usefixtures("small_vocabulary")
def test_the_finished_folder_loads_as_any_other(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = train_vlm(config(tmp_path, steps=1, vision_steps=1), SIZE)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.float32
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.float16}  # noqa: SIM118
    processor = AutoProcessor.from_pretrained(folder)
    large = Image.new("RGB", (500, 300))
    inputs = processor(images=[large], text=["<IMG_CONTEXT>x"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)  # one tile, however large
    assert str(tmp_path) not in (folder / "config.json").read_text()
