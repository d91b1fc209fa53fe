"""GenEval: rules on synthetic detections, prompts, the detector path on tiny real networks."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_vision import NAMES, write_mask2former
from torch import Tensor

from mmalign.registry import UnknownNameError
from mmalign.types import Media
from vision_rewards.geneval import GenEval
from vision_rewards.geneval_models import GREY, ColorClassifier, Detector, crop, instances
from vision_rewards.geneval_prompts import (
    CLASSES,
    GenEvalPromptError,
    canonical,
    parse_prompt,
)
from vision_rewards.geneval_rules import (
    COLORS,
    RELATIONS,
    Clause,
    Detection,
    Requirement,
    judge,
    partial,
    relations,
)

BOX = (0.0, 0.0, 10.0, 10.0)


def at(x: float, y: float, side: float = 10.0) -> Detection:
    return Detection((x - side / 2, y - side / 2, x + side / 2, y + side / 2), 0.95)


def things(count: int) -> list[Detection]:
    return [Detection(BOX, 0.99 - k / 100) for k in range(count)]


def painted(*colors: str):
    """Colours of objects in order of confidence; the first ``len(objects)`` are told."""

    def color_of(name: str, objects: Sequence[Detection]) -> list[str]:
        return list(colors[: len(objects)])

    return color_of


def no_colors(name: str, objects: Sequence[Detection]) -> list[str]:
    raise AssertionError("nobody asked for a colour")


def wanted(*include: Clause, exclude: Sequence[Clause] = (), tag: str = "") -> Requirement:
    return Requirement(tuple(include), tuple(exclude), tag)


# --- positions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "holds"),
    [
        (-50, 0, {"left of"}),
        (50, 0, {"right of"}),
        (0, -50, {"above"}),
        (0, 50, {"below"}),
        (-50, -50, {"left of", "above"}),
        (50, 50, {"right of", "below"}),
        (50, -50, {"right of", "above"}),
        (-50, 50, {"left of", "below"}),
        (0, 0, set()),
        (2, 0, set()),  # 0.1 * (10 + 10) = 2: inside the dead zone
        (0, 2, set()),
        (2.0005, 0, set()),  # what is left is below 1e-3
        (3.9, 0, set()),  # 1.9 / 3.9 < 0.5
        (4.1, 0, {"right of"}),  # 2.1 / 4.1 > 0.5
        (50, 20, {"right of"}),  # 18 / 53.9 < 0.5
    ],
)
def test_relations(x, y, holds):
    assert relations(at(x, y).box, at(0, 0).box) == holds


def test_relations_mirror_and_scale():
    flip = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        a, b = (torch.rand(2, 4, generator=generator) * 100).tolist()
        a, b = (
            (min(q[0], q[2]), min(q[1], q[3]), max(q[0], q[2]), max(q[1], q[3])) for q in (a, b)
        )
        holds = relations(a, b)
        assert relations(b, a) == {flip[r] for r in holds}
        assert relations([7 * v for v in a], [7 * v for v in b]) == holds
        assert not {"left of", "right of"} <= holds and not {"above", "below"} <= holds


# --- counting, classes, exclusion --------------------------------------------------------------


@pytest.mark.parametrize(("want", "found"), itertools.product(range(1, 5), range(7)))
def test_counting_exhaustively(want, found):
    objects = {"clock": things(found)}
    alone = wanted(Clause("clock", want))
    counting = wanted(Clause("clock", want), exclude=[Clause("clock", want + 1)], tag="counting")
    assert judge(objects, alone, no_colors).passed == (found >= want)
    assert judge(objects, counting, no_colors).passed == (found == want)
    assert judge(objects, alone, no_colors, exact=True).passed == (found == want)
    credit = 1 - abs(want - found) / want
    assert partial(objects, counting, no_colors) == pytest.approx(max(0.0, credit))
    assert partial(objects, counting, no_colors, floor=None) == pytest.approx(credit)
    assert partial(objects, counting, no_colors, floor=-0.5) == pytest.approx(max(-0.5, credit))


def test_reasons_name_what_is_wrong():
    need = wanted(Clause("clock", 2), exclude=[Clause("dog", 1)])
    verdict = judge({"dog": things(1)}, need, no_colors)
    assert verdict.reasons == ("expected clock>=2, found 0", "expected dog<1, found 1")
    exact = judge({"clock": things(3)}, need, no_colors, exact=True)
    assert exact.reasons == ("expected clock==2, found 3",)


def test_two_objects():
    need = wanted(Clause("dog"), Clause("cat"))
    for dogs, cats in itertools.product(range(3), repeat=2):
        objects = {"dog": things(dogs), "cat": things(cats)}
        assert judge(objects, need, no_colors).passed == (dogs >= 1 and cats >= 1)
        assert judge(objects, need, no_colors, exact=True).passed == (dogs == cats == 1)
        both = (max(0, 1 - abs(1 - dogs)) + max(0, 1 - abs(1 - cats))) / 2
        assert partial(objects, need, no_colors) == pytest.approx(both)


# --- colours -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "seen", "official", "strict", "credit"),
    [
        (1, ("red",), True, True, 1.0),
        (1, ("blue",), False, False, 0.5),
        (1, (), False, False, 0.0),
        (1, ("red", "blue"), True, False, 0.0),  # official looks at the most confident one
        (1, ("blue", "red"), False, False, 0.0),
        (2, ("red", "red"), True, True, 1.0),
        (2, ("red", "blue"), False, False, 0.75),
        (2, ("red", "red", "blue"), True, False, 0.25),
        (2, ("red",), False, False, 0.25),
    ],
)
def test_colors(count, seen, official, strict, credit):
    objects, need = {"cup": things(len(seen))}, wanted(Clause("cup", count, "red"))
    assert judge(objects, need, painted(*seen)).passed == official
    assert judge(objects, need, painted(*seen), exact=True).passed == strict
    assert partial(objects, need, painted(*seen)) == pytest.approx(credit)


def test_color_reason():
    verdict = judge({"cup": things(2)}, wanted(Clause("cup", 2, "red")), painted("blue", "red"))
    assert verdict.reasons == ("expected red cup>=2, found 1 red, 1 blue",)


# --- positions between clauses -----------------------------------------------------------------

LEFT = wanted(Clause("tv"), Clause("dog", relation="left of", target=0), tag="position")


def test_position_passes_only_on_its_side():
    for relation, (x, y) in zip(RELATIONS, ((-50, 0), (50, 0), (0, -50), (0, 50)), strict=True):
        objects = {"tv": [at(0, 0)], "dog": [at(x, y)]}
        for asked in RELATIONS:
            need = wanted(Clause("tv"), Clause("dog", relation=asked, target=0))
            for exact in (False, True):
                passed = judge(objects, need, no_colors, exact=exact).passed
                assert passed == (asked == relation)
            assert partial(objects, need, no_colors) == pytest.approx((2 + (asked == relation)) / 3)


def test_official_position_looks_at_the_most_confident():
    far = {"tv": [at(0, 0)], "dog": [at(-50, 0), at(50, 0)]}
    assert judge(far, LEFT, no_colors).passed
    assert not judge({**far, "dog": far["dog"][::-1]}, LEFT, no_colors).passed
    assert not judge(far, LEFT, no_colors, exact=True).passed


def test_every_pair_has_to_stand_in_the_relation():
    need = wanted(Clause("tv", 2), Clause("dog", 1, relation="left of", target=0))
    assert judge({"tv": [at(0, 0), at(30, 0)], "dog": [at(-50, 0)]}, need, no_colors).passed
    assert not judge({"tv": [at(0, 0), at(-90, 0)], "dog": [at(-50, 0)]}, need, no_colors).passed


def test_missing_target():
    verdict = judge({"dog": [at(0, 0)]}, LEFT, no_colors)
    assert verdict.reasons == ("expected tv>=1, found 0", "no target for dog to be left of")
    assert partial({"dog": [at(0, 0)]}, LEFT, no_colors) == pytest.approx((0 + 1 + 0) / 3)
    assert partial({}, LEFT, no_colors) == 0.0


def test_port_reproduces_its_quirks():
    wrong = {"tv": [at(0, 0)], "dog": [at(50, 0)]}
    assert partial(wrong, LEFT, no_colors) == pytest.approx(2 / 3)
    assert partial(wrong, LEFT, no_colors, compat="port") == pytest.approx((1 + 1 + 0 + 1) / 4)
    right = {"tv": [at(0, 0)], "dog": [at(-50, 0)]}
    assert partial(right, LEFT, no_colors, compat="port") == 1.0
    # No target: one 0 and no 1.
    lone = {"dog": [at(0, 0)]}
    assert partial(lone, LEFT, no_colors, compat="port") == pytest.approx((0 + 1 + 0) / 3)
    with pytest.raises(UnknownNameError, match="compat"):
        partial(right, LEFT, no_colors, compat="prot")


def test_partial_is_one_exactly_where_strict_passes():
    spots, colors = ((-50, 0), (50, 0)), ("red", "blue")
    need = wanted(Clause("tv", 1, "red"), Clause("dog", 1, "blue", "left of", 0))
    for tvs, dogs in itertools.product(range(3), repeat=2):
        for spot, tv, dog in itertools.product(spots, colors, colors):
            objects = {"tv": [at(0, 0)] * tvs, "dog": [at(*spot)] * dogs}
            told = {"tv": tv, "dog": dog}

            def color_of(name, found, told=told):
                return [told[name]] * len(found)

            strict = judge(objects, need, color_of, exact=True).passed
            assert (partial(objects, need, color_of) == 1.0) == strict


# --- requirements and prompts ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "needs 'include' or 'exclude'"),
        ({"include": [{"count": 1}]}, "names no class"),
        ({"include": [{"class": "dog", "count": 0}]}, "whole number from 1"),
        ({"include": [{"class": "dog", "count": 1, "color": "rde"}]}, "'red'"),
        ({"include": [{"class": "dog", "position": ["left", 0]}]}, "left of"),
        ({"include": [{"class": "dog", "position": ["left of", 0]}]}, "not an earlier"),
    ],
)
def test_unusable_requirements_say_why(metadata, says):
    with pytest.raises(ValueError, match=says):
        Requirement.of(metadata)


def official_prompts() -> list[dict]:
    """Prompts and metadata as the benchmark's generator writes them, over all classes."""

    def a(name: str) -> str:
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"

    def many(name: str) -> str:
        return name + ("es" if name.endswith("s") else "s")

    numbers = {2: "two", 3: "three", 4: "four"}
    rows = []
    for k, name in enumerate(CLASSES):
        other, color, hue = CLASSES[(k + 7) % 80], COLORS[k % 10], COLORS[(k + 3) % 10]
        relation, count = RELATIONS[k % 4], 2 + k % 3
        one = [{"class": name, "count": 1}]
        rows += [
            ("single_object", f"a photo of {a(name)}", one, []),
            ("two_object", f"a photo of {a(name)} and {a(other)}",
             [*one, {"class": other, "count": 1}], []),
            ("counting", f"a photo of {numbers[count]} {many(name)}",
             [{"class": name, "count": count}], [{"class": name, "count": count + 1}]),
            ("colors", f"a photo of {a(color)} {name}", [{**one[0], "color": color}], []),
            ("position", f"a photo of {a(name)} {relation} {a(other)}",
             [{"class": other, "count": 1}, {**one[0], "position": [relation, 0]}], []),
            ("color_attr", f"a photo of {a(color)} {name} and {a(hue)} {other}",
             [{**one[0], "color": color}, {"class": other, "count": 1, "color": hue}], []),
        ]  # fmt: skip
    names = ("tag", "prompt", "include", "exclude")
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_prompts_are_read_back_as_the_benchmark_means_them():
    rows = official_prompts()
    assert Counter(r["tag"] for r in rows).most_common() == [(t, 80) for t in Counter(
        r["tag"] for r in rows)]  # fmt: skip
    for row in rows:
        assert parse_prompt(row["prompt"]) == Requirement.of(json.loads(json.dumps(row)))


@pytest.mark.parametrize(
    ("prompt", "include"),
    [
        ("A photo of a dog to the left of a TV.",
         (Clause("tv"), Clause("dog", relation="left of"))),
        ("a photo of an orange", (Clause("orange"),)),
        ("a photo of an orange orange", (Clause("orange", 1, "orange"),)),
        ("a photo of a white teddy bear", (Clause("teddy bear", 1, "white"),)),
        ("a photo of two red apples", (Clause("apple", 2, "red"),)),
        ("a photo of three knives", (Clause("knife", 3),)),
        ("a photo of two people", (Clause("person", 2),)),
        ("a photo of four skis", (Clause("skis", 4),)),
    ],
)  # fmt: skip
def test_prompt_corners(prompt, include):
    assert parse_prompt(prompt).include == include


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("two clocks", "does not start with"),
        ("a photo of a dgo", "did you mean 'dog'"),
        ("a photo of a dog and a cat and a cow", "3 things"),
        ("", "does not start with"),
    ],
)
def test_prompts_outside_the_grammar(prompt, says):
    with pytest.raises(GenEvalPromptError, match=says):
        parse_prompt(prompt)


def test_classes_are_cocos_eighty():
    assert len(set(CLASSES)) == 80
    assert [canonical(n) for n in ("Keyboard", "tvmonitor", "cat")] == [
        "computer keyboard", "tv", "cat",
    ]  # fmt: skip


# --- masks and crops ---------------------------------------------------------------------------


def test_instances_closed_form():
    """Confidence is class probability times mean mask probability inside; boxes are extents."""
    masks = torch.full((3, 8, 8), -4.0)
    masks[0, 2:4, 1:6] = 2.0
    masks[1, :, :] = -1.0  # nothing inside: no object
    masks[2, 7, 7] = 1.0
    chances = torch.tensor([[0.9, 0.05], [0.1, 0.8], [0.2, 0.6]])
    got = dict(instances(chances, masks, (8, 8), 0.3))
    assert set(got) == {0, 1}
    assert got[0].box == (1, 2, 6, 4)
    assert got[0].score == pytest.approx(0.9 * torch.sigmoid(torch.tensor(2.0)).item())
    assert got[1].box == (7, 7, 8, 8)
    assert got[1].score == pytest.approx(0.6 * torch.sigmoid(torch.tensor(1.0)).item())
    assert got[0].mask.sum() == 10
    assert instances(chances, masks, (8, 8), 0.95) == []


def test_crops_are_grey_outside_the_mask():
    picture, mask = torch.zeros(3, 10, 12), torch.zeros(10, 12, dtype=torch.bool)
    mask[3, 4] = True
    cut = crop(picture, Detection((3.6, 2.4, 7.2, 5.7), 1.0, mask))
    assert cut.shape == (3, 4, 3)  # rounded box (4, 2, 7, 6)
    assert cut[0, 1, 0] == 0 and (cut == GREY).sum() == cut.numel() - 3
    assert crop(picture, Detection((-5, -5, 99, 99), 1.0)).shape == (3, 10, 12)
    assert crop(picture, Detection((30, 30, 31, 31), 1.0)).shape == (3, 1, 1)


# --- real networks, tiny and untrained ---------------------------------------------------------


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained Mask2Former with its image processor."""
    return write_mask2former(tmp_path_factory.mktemp("mask2former"))


@pytest.fixture(scope="module")
def detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained YOLOS (DETR's head on a plain ViT: no backbone of another library)."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=[64, 64], num_detection_tokens=10, id2label=NAMES,
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    model.class_labels_classifier.layers[-1].weight.data.normal_(0, 3)
    folder = tmp_path_factory.mktemp("yolos")
    model.save_pretrained(folder)
    YolosImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained open_clip model in a folder."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 1},
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    return folder


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(3, 3, 48, 72, generator=torch.Generator().manual_seed(1))


def test_a_detector_without_its_head_is_refused(detr: Path, tmp_path: Path):
    """transformers draws at random what a file lacks, and only warns."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(detr, tmp_path / "headless")
    state = load_file(folder / "model.safetensors")
    cut = {k: v for k, v in state.items() if not k.startswith("class_labels_classifier")}
    save_file({**cut, "of.older.releases": torch.ones(1)}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match=r"do not fit the network. missing: class_labels_class"):
        Detector(folder, floor=0.2)


def test_mask2former_path(mask2former: Path, pictures: Tensor):
    detector = Detector(mask2former, floor=0.2)
    assert detector.classes == ("computer mouse", "dog", "person")
    found = detector(pictures)
    objects = [one for row in found for several in row.values() for one in several]
    assert objects, "the fixture finds nothing: the test would prove nothing"
    for row in found:
        for several in row.values():
            assert [o.score for o in several] == sorted((o.score for o in several), reverse=True)
    for one in objects:
        x0, y0, x1, y1 = one.box
        assert one.score > 0.2 and one.mask.shape == (48, 72)
        assert 0 <= x0 < x1 <= 72 and 0 <= y0 < y1 <= 48
        assert one.mask[int(y0) : int(y1), int(x0) : int(x1)].sum() == one.mask.sum()
    alone = [detector(p[None])[0] for p in pictures]
    for a, b in zip(alone, found, strict=True):
        assert {n: len(v) for n, v in a.items()} == {n: len(v) for n, v in b.items()}


def test_mask2former_agrees_with_the_stock_post_processing(mask2former: Path, pictures: Tensor):
    """At 384 pixels the stock function enlarges masks as we do: same labels, scores, areas."""
    detector = Detector(mask2former, floor=0.2)
    square = torch.nn.functional.interpolate(pictures[:1], (384, 384))
    inputs = detector.processor(images=Media(square).to_pil(), return_tensors="pt")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    (stock,) = detector.processor.post_process_instance_segmentation(
        outputs, threshold=0.2, target_sizes=[(384, 384)], return_binary_maps=True
    )
    expected = sorted(
        (s["label_id"], round(s["score"], 4), int(m.sum()))
        for s, m in zip(stock["segments_info"], stock["segmentation"], strict=True)
    )
    got = instances(
        outputs.class_queries_logits[0].softmax(-1)[:, :-1],
        outputs.masks_queries_logits[0], (384, 384), 0.2,
    )  # fmt: skip
    kept = [(label, o) for label, o in got if o.score >= 0.2]
    assert len(expected) > 1
    assert expected == sorted((k, round(o.score, 4), int(o.mask.sum())) for k, o in kept)


def test_plain_detector_path(detr: Path, pictures: Tensor):
    found = Detector(detr, floor=0.2)(pictures)
    objects = [one for row in found for several in row.values() for one in several]
    assert objects and all(o.mask is None and o.score > 0.2 for o in objects)
    assert {n for row in found for n in row} <= {"person", "computer mouse", "dog", "n/a"}


def test_colors_by_clip(clip: Path, pictures: Tensor):
    """Against CLIP's own functions, object by object and template by template."""
    colors = ColorClassifier(clip)
    objects = [Detection((4, 4, 40, 44), 0.9), Detection((30, 2, 70, 30), 0.8)]
    told = colors(pictures[0], "dog", objects)
    for one, color in zip(objects, told, strict=True):
        seen = colors.embedder.image(crop(pictures[0], one)[None])
        chances = []
        for c in COLORS:
            texts = [f"a photo of a {c} dog", f"a photo of a {c}-colored dog",
                     f"a photo of a {c} object"]  # fmt: skip
            mean = colors.embedder.text(texts).mean(0)
            chances.append(float(seen[0] @ mean / mean.norm()))
        assert color == COLORS[chances.index(max(chances))]
    assert colors(pictures[0], "dog", []) == []


@pytest.fixture(scope="module")
def reward(mask2former: Path, clip: Path) -> GenEval:
    return GenEval(mask2former, colors=clip, threshold=0.2, counting_threshold=0.3, mode="partial")


def test_reward_end_to_end(reward: GenEval, pictures: Tensor):
    prompts = ["a photo of a red dog", "a photo of a person left of a dog", "a photo of two dogs"]
    got = reward.score(Media(pictures), prompts)
    assert got.valid.all() and got.identity == reward.identity
    assert set(got.parts) == {"official", "strict", "partial"}
    assert got.value.equal(got.parts["partial"])
    assert ((got.value == 1) == (got.parts["strict"] == 1)).all()
    alone = [reward.score(Media(pictures[k : k + 1]), prompts[k : k + 1]) for k in range(3)]
    assert torch.stack([s.value[0] for s in alone]).equal(got.value)
    # By hand, from the detector and the rules.
    objects = reward.detector(pictures.mul(255).round().div(255))[2]
    sure = {n: [o for o in v if o.score > 0.3] for n, v in objects.items()}
    counting = parse_prompt(prompts[2])
    assert got.value[2] == pytest.approx(partial(sure, counting, no_colors))


def test_context_goes_before_the_prompt(reward: GenEval, pictures: Tensor):
    found = reward.detector(pictures[:1].mul(255).round().div(255))[0]
    name, several = max(found.items(), key=lambda item: len(item[1]))
    asked = {"tag": "x", "include": [{"class": name, "count": len(several)}]}
    got = reward.score(Media(pictures[:1]), ["no grammar"], [{"geneval": asked}])
    assert got.value.tolist() == [1.0] and got.parts["official"].tolist() == [1.0]
    with pytest.raises(ValueError, match="names no class"):
        reward.score(Media(pictures[:1]), ["x"], [{"geneval": {"include": [{"count": 1}]}}])


def test_what_cannot_be_judged_is_unscored(reward: GenEval, mask2former: Path, pictures: Tensor):
    prompts = ["a castle", "a photo of a zebra", "a photo of a dog"]
    got = reward.score(Media(pictures), prompts)
    assert got.valid.tolist() == [False, False, True]
    assert "does not start with" in got.notes[0] and "no class" in got.notes[1]
    asked = [{"geneval": {"include": [{"class": "zebra"}]}}, {}, {}]
    assert "does not know 'zebra'" in reward.score(Media(pictures), prompts, asked).notes[0]
    blind = GenEval(mask2former, colors=None)
    got = blind.score(Media(pictures[:2]), ["a photo of a red dog", "a photo of a dog"])
    assert got.valid.tolist() == [False, True] and "colour" in got.notes[0]


def test_settings_change_the_identity(mask2former: Path):
    options = ({}, {"mode": "strict"}, {"threshold": 0.4}, {"compat": "port"}, {"floor": None},
               {"max_objects": 4})  # fmt: skip
    made = [GenEval(mask2former, colors=None, **o) for o in options]
    assert len({m.identity for m in made}) == len(made)
    assert GenEval(mask2former, colors=None, mode="partial", floor=None).info.range == (None, 1.0)
    with pytest.raises(UnknownNameError, match="partial"):
        GenEval(mask2former, mode="partail")


def test_threshold_of_counting_and_most_objects(mask2former: Path):
    reward = GenEval(mask2former, colors=None, max_objects=2)
    several = [Detection(BOX, s) for s in (0.95, 0.92, 0.91, 0.9, 0.5)]
    for tag, threshold in (("counting", 0.9), ("colors", 0.3)):
        kept = reward._confident({"dog": several}, wanted(Clause("dog"), tag=tag))["dog"]
        assert kept == several[:2]
        reward.max_objects = 16
        kept = reward._confident({"dog": several}, wanted(Clause("dog"), tag=tag))["dog"]
        assert [o.score for o in kept] == [s.score for s in several if s.score > threshold]
        reward.max_objects = 2
    assert math.isnan(reward.score(Media(torch.rand(1, 3, 32, 32)), ["?"]).value.item())
