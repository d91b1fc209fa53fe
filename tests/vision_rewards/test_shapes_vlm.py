"""The shipped small VLM: what it can see, and every judge end to end on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.assets import asset
from mmalign.shapes import caption
from mmalign.types import Media
from trainers.pretrain.vlm_accuracy import (
    accuracy,
    answers,
    contests,
    held_out,
    pair_questions,
    position_bias,
    test_pictures,
)
from trainers.pretrain.vlm_pictures import generate_pictures
from vision_rewards.judge.auto_rubric import AutoRubric
from vision_rewards.judge.critique import CritiqueJudge
from vision_rewards.judge.local import LocalBackend
from vision_rewards.judge.pairwise import PairwiseJudge
from vision_rewards.judge.pointwise import RubricJudge
from vision_rewards.judge.unified_reward import UnifiedReward, UnifiedRewardPair
from vision_rewards.judge.yes_no import VqaScore, YesNoJudge

test_pictures.__test__ = False  # type: ignore[attr-defined]  # a helper, not a test

# Share of right answers on test compositions that the shipped weights must reach.
FLOORS = {"verify": 0.75, "exists": 0.85, "count": 0.7, "colour": 0.75, "criterion": 0.75}
GENERATED_FLOOR, PAIR_FLOOR = 0.65, 0.52  # generated pictures; comparisons, ties included
QUESTIONS = 60


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = asset("shapes-vlm")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def backend() -> LocalBackend:
    return LocalBackend(asset("shapes-vlm"), batch_size=16)


@pytest.fixture(scope="module")
def pairs() -> list[Any]:
    return contests(24, seed=7)


def media(pictures: list[Any]) -> Media:
    pixels = torch.from_numpy(np.stack([p.pixels for p in pictures]))
    return Media(pixels.permute(0, 3, 1, 2).float() / 255)


def test_it_is_small() -> None:
    files = [p for p in asset("shapes-vlm").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 8e6


def test_answers_on_fresh_scenes_of_test_compositions(vlm: tuple[Any, Any]) -> None:
    asked = held_out(test_pictures(150, seed=11), list(FLOORS), QUESTIONS, seed=11)
    shares = {kind: share.value for kind, share in accuracy(*vlm, asked).items()}
    assert {k: v for k, v in shares.items() if v < FLOORS[k]} == {}


def test_it_judges_pictures_of_the_generator(vlm: tuple[Any, Any], tmp_path: Path) -> None:
    pictures = generate_pictures(tmp_path / "g.npz", 60, "test", seed=5, batch_size=30)
    share = accuracy(*vlm, held_out(pictures, ["verify"], 90, seed=5))["verify"]
    assert share.value > GENERATED_FLOOR, share


def test_comparisons_do_not_hang_on_the_order(vlm: tuple[Any, Any], pairs: list[Any]) -> None:
    bias = position_bias(*vlm, pairs)
    assert bias["right"].value > PAIR_FLOOR
    assert abs(bias["first wins"].value - 0.5) < 0.3


def test_padding_on_the_left_changes_nothing(vlm: tuple[Any, Any]) -> None:
    asked = held_out(test_pictures(20), ["verify", "describe", "judge_default"], 4)
    together = answers(*vlm, asked, batch_size=12)
    assert together == [answers(*vlm, [a])[0] for a in asked]
    lengths = {len(q.text) for _, q in asked}
    assert len(lengths) > 3


def test_pictures_of_any_size_are_seen_alike(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    pictures = [Image.fromarray(p.pixels) for p in test_pictures(6, seed=2)]
    said = []
    for side in (64, 256):
        images = [p.resize((side, side), Image.Resampling.BICUBIC) for p in pictures]
        content = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(images=images, text=[chat] * 6, padding=True, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        said.append(processor.batch_decode(made[:, inputs["input_ids"].shape[1] :]))
    assert sum(a == b for a, b in zip(*said, strict=True)) >= 5


# --- every judge, end to end ----------------------------------------------------------------

POINTWISE = {
    "vqascore": lambda b: VqaScore(backend=b),
    "yes_no": lambda b: YesNoJudge(backend=b),
    "yes_no_think": lambda b: YesNoJudge(backend=b, reasoning=True, max_tokens=48),
    "rubric_shapes": lambda b: RubricJudge(backend=b, rubric="shapes", max_tokens=64),
    "rubric_default": lambda b: RubricJudge(backend=b, max_tokens=96),
    "critique": lambda b: CritiqueJudge(backend=b, max_tokens=128),
    "auto_rubric": lambda b: AutoRubric(backend=b, max_tokens=128),
    "unified": lambda b: UnifiedReward(backend=b, max_tokens=96),
    "unified_axes": lambda b: UnifiedReward(backend=b, mode="axes", max_tokens=48),
}
PAIRWISE = {
    "pairwise": lambda b: PairwiseJudge(backend=b, max_tokens=96),
    "pairwise_soft": lambda b: PairwiseJudge(backend=b, soft=True),
    "rank": lambda b: UnifiedRewardPair(backend=b, max_tokens=16),
    "think": lambda b: UnifiedRewardPair(backend=b, mode="think", max_tokens=96),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_judges_prefer_the_picture_that_fits(
    name: str, backend: LocalBackend, pairs: list[Any]
) -> None:
    judge = POINTWISE[name](backend)
    prompts = [caption(spec) for _, _, spec in pairs]
    good, bad = (judge.score(media([p[k] for p in pairs]), prompts) for k in (0, 1))
    assert good.valid.float().mean() > 0.9 and bad.valid.float().mean() > 0.9, good.notes
    both = good.valid & bad.valid
    ahead = (good.value > bad.value).float() + 0.5 * (good.value == bad.value)
    assert ahead[both].mean() > 0.6


@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_judges_prefer_the_picture_that_fits(
    name: str, backend: LocalBackend, pairs: list[Any]
) -> None:
    judge = PAIRWISE[name](backend)
    some = pairs[:12]
    opponents = media([bad for _, bad, _ in some]).to_pil()
    context = [{"opponent": o} for o in opponents]
    prompts = [caption(spec) for _, _, spec in some]
    score = judge.score(media([good for good, _, _ in some]), prompts, context)
    assert score.valid.float().mean() > 0.9, score.notes
    assert score.value[score.valid].mean() > 0.55


def test_shares_of_quality_are_answered_in_their_form(
    backend: LocalBackend, pairs: list[Any]
) -> None:
    """Readable is all that they are: at this size the shares say little about the pictures."""
    judge = UnifiedRewardPair(backend=backend, mode="score", max_tokens=64)
    context = [{"opponent": o} for o in media([bad for _, bad, _ in pairs[:8]]).to_pil()]
    prompts = [caption(spec) for _, _, spec in pairs[:8]]
    score = judge.score(media([good for good, _, _ in pairs[:8]]), prompts, context)
    assert score.valid.all(), score.notes


def test_every_comparison_is_answered_in_its_form(vlm: tuple[Any, Any], pairs: list[Any]) -> None:
    shares = accuracy(*vlm, pair_questions(pairs[:12]))
    assert len(shares) == 6
    del shares["judge_pair_score"]  # six numbers must all be right
    assert all(share.value > 0.25 for share in shares.values()), shares
