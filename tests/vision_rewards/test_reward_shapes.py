"""The shapes verifiers agree with the ground truth they were built against."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from mmalign.shapes import (
    COLORS,
    SHAPES,
    TASKS,
    Placed,
    PromptSpec,
    Scene,
    caption,
    parse,
    render,
    sample_scene,
    sample_spec,
)
from mmalign.shapes.splits import SPLITS
from mmalign.types import Media
from vision_rewards.shapes import ShapesPartial, ShapesStrict, Verdict, verify

GREY = ((200, 200, 200), (200, 200, 200))
RGB = {"red": (215, 30, 35), "blue": (35, 75, 205), "yellow": (245, 220, 40)}


def pixels(pictures: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p) for p in pictures]).astype(np.float32) / 255


def draw(*objects: tuple[str, str, float, float], size: int = 64) -> Image.Image:
    """Draw ``(colour, shape, x, y)`` objects on plain grey."""
    placed = tuple(Placed(s, c, x, y, 0.17, 0.0, RGB[c]) for c, s, x, y in objects)
    return render(Scene(placed, GREY), size)


def judge(picture: Image.Image, prompt: str) -> Verdict:
    return verify(pixels([picture]), [f"a photo of {prompt}"])[0]


def near_tie(scene: Scene, spec: PromptSpec) -> bool:
    if spec.relation is None or len(scene.objects) != 2:
        return False
    a, b = scene.objects
    distance = a.x - b.x if spec.relation in ("left", "right") else a.y - b.y
    return abs(distance) < 0.05


@pytest.fixture(scope="module")
def drawn() -> tuple[list[PromptSpec], list[Scene], np.ndarray]:
    """5,004 scenes over every task and split."""
    rng = random.Random(20)
    cells = [(task, split) for task in TASKS for split in SPLITS] * 278
    specs = [sample_spec(rng, split, task) for task, split in cells]
    scenes = [sample_scene(s, rng) for s in specs]
    return specs, scenes, pixels([render(s) for s in scenes])


def test_strict_accepts_what_was_drawn(drawn: tuple) -> None:
    specs, _, images = drawn
    verdicts = verify(images, [caption(s) for s in specs])
    accepted = np.asarray([v.strict for v in verdicts])
    for task in TASKS:
        mine = [s.task == task for s in specs]
        assert accepted[mine].mean() > 0.99, task
    assert all(v.partial >= 0.9 for v in verdicts if v.strict)


@pytest.mark.parametrize("same_task", [True, False])
def test_strict_rejects_what_was_not_asked_for(drawn: tuple, same_task: bool) -> None:
    specs, scenes, images = drawn
    rng = random.Random(21)
    asked = [sample_spec(rng, "train", s.task if same_task else None) for s in specs]
    verdicts = verify(images, [caption(s) for s in asked])
    wrong = [
        v
        for v, scene, spec in zip(verdicts, scenes, asked, strict=True)
        if not scene.satisfies(spec) and not near_tie(scene, spec)
    ]
    assert len(wrong) > 2500
    assert np.mean([v.strict for v in wrong]) < 0.01
    assert all(0.0 <= v.partial < 0.9 and v.note for v in wrong if not v.strict)


@pytest.mark.parametrize("task", ["position", "color_attr"])
def test_strict_rejects_a_swapped_prompt(task: str) -> None:
    rng = random.Random(22)
    specs = [sample_spec(rng, "train", task) for _ in range(200)]
    if task == "position":
        swapped = [PromptSpec(s.objects[::-1], s.relation) for s in specs]
    else:
        swapped = [parse(_swap_colors(s)) for s in specs]
    scenes = [sample_scene(s, rng) for s in specs]
    verdicts = verify(pixels([render(s) for s in scenes]), [caption(s) for s in swapped])
    truth = [c.satisfies(s) for c, s in zip(scenes, swapped, strict=True)]
    assert [v.strict for v in verdicts] == truth


def _swap_colors(spec: PromptSpec) -> str:
    a, b = spec.objects
    return caption(parse(f"a photo of a {b.color} {a.shape} and a {a.color} {b.shape}"))


def test_notes_say_what_is_wrong() -> None:
    star, circle = ("yellow", "star", 0.3, 0.5), ("blue", "circle", 0.75, 0.5)
    assert judge(draw(star), "a red star").note == "star is yellow, expected red"
    assert "expected 1 object, found 2" in judge(draw(star, circle), "a star").note
    assert judge(draw(star, circle), "a star to the right of a circle").note == (
        "star is not right of circle"
    )
    assert "circle is missing" in judge(draw(star), "a star and a circle").note
    assert judge(draw(star), "a circle").note == "expected a circle, found a star"
    passed = judge(draw(star, circle), "a star to the left of a circle")
    assert passed.strict and passed.note == ""


def test_parts_of_strict() -> None:
    picture = draw(("yellow", "star", 0.3, 0.5), ("blue", "circle", 0.75, 0.5))
    parts = judge(picture, "a red star to the right of a circle").parts
    assert parts == {"count": 1.0, "shape": 1.0, "color": 0.0, "relation": 0.0}
    assert judge(draw(("red", "star", 0.5, 0.5)), "a circle").parts["color"] == 1.0


def test_partial_never_falls_when_a_defect_is_fixed() -> None:
    extra = ("blue", "square", 0.75, 0.8)
    ladder = [
        draw(),
        draw(("blue", "circle", 0.75, 0.3)),
        draw(("blue", "circle", 0.75, 0.3), ("yellow", "circle", 0.25, 0.3), extra),
        draw(("blue", "circle", 0.25, 0.3), ("yellow", "star", 0.75, 0.3), extra),
        draw(("blue", "circle", 0.25, 0.3), ("red", "star", 0.75, 0.3), extra),
        draw(("blue", "circle", 0.75, 0.3), ("red", "star", 0.25, 0.3), extra),
        draw(("blue", "circle", 0.75, 0.3), ("red", "star", 0.25, 0.3)),
    ]
    prompt = "a photo of a red star to the left of a blue circle"
    credit = [v.partial for v in verify(pixels(ladder), [prompt] * len(ladder))]
    assert credit == sorted(credit) and len(set(credit)) == len(credit)
    assert credit[0] == 0.0 and credit[-1] > 0.95


def _spoil(spec: PromptSpec, defects: frozenset[str], rng: random.Random) -> Image.Image:
    """A picture of ``spec`` with some of its facts wrong, drawn on four fixed places."""
    places = {
        None: [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)],
        "left": [(0.27, 0.27), (0.73, 0.27)],
        "right": [(0.73, 0.27), (0.27, 0.27)],
        "above": [(0.27, 0.27), (0.27, 0.73)],
        "below": [(0.27, 0.73), (0.27, 0.27)],
    }[spec.relation]
    wanted = [o for o in spec.objects for _ in range(o.count)]
    shapes, colors = [o.shape for o in wanted], [o.color or "red" for o in wanted]
    if "shape" in defects:
        shapes[0] = next(s for s in SHAPES if s not in shapes)
    if "color" in defects:
        colors[-1] = next(c for c in COLORS if c not in colors)
    order = places[: len(wanted)][:: -1 if "relation" in defects else 1]
    drawn = [
        Placed(s, c, x, y, 0.165, 0.0, COLORS[c])
        for s, c, (x, y) in zip(shapes, colors, order, strict=True)
    ]
    if "missing" in defects:
        del drawn[rng.randrange(len(drawn))]
    if "extra" in defects:
        # A shape and colour nobody asked for: else it might stand in for a spoiled object.
        shape = next(s for s in SHAPES if s not in (o.shape for o in wanted))
        color = next(c for c in COLORS if c not in (o.color for o in wanted))
        drawn.append(Placed(shape, color, 0.73, 0.73, 0.165, 0.0, COLORS[color]))
    return render(Scene(tuple(drawn), GREY))


def test_fixing_one_defect_of_many_never_lowers_the_credit() -> None:
    rng = random.Random(23)
    before: list[Image.Image] = []
    after: list[Image.Image] = []
    prompts: list[str] = []
    while len(prompts) < 600:
        spec = sample_spec(rng, "train")
        possible = ["shape"] + ["missing"] * (spec.total > 1) + ["relation"] * bool(spec.relation)
        possible += ["color"] * bool(spec.objects[-1].color) + ["extra"] * (spec.total < 4)
        defects = rng.sample(possible, rng.randint(1, min(3, len(possible))))
        if {"missing", "extra"} <= set(defects):  # one hides the other in the count
            continue
        seed = rng.random()
        before.append(_spoil(spec, frozenset(defects), random.Random(seed)))
        after.append(_spoil(spec, frozenset(defects[1:]), random.Random(seed)))
        prompts.append(caption(spec))
    worse, better = verify(pixels(before), prompts), verify(pixels(after), prompts)
    for a, b, prompt in zip(worse, better, prompts, strict=True):
        assert b.partial >= a.partial - 1e-3, (prompt, a.note, b.note)


def test_partial_rises_with_each_object_counted() -> None:
    places = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    stars = [("red", "star", x, y) for x, y in places]
    credit = [judge(draw(*stars[:n]), "four red stars").partial for n in range(5)]
    assert credit == sorted(credit) and len(set(credit)) == 5
    assert judge(draw(*stars), "three stars").partial < 0.9


def test_partial_is_graded_by_position_and_colour() -> None:
    def at(x: float) -> float:
        picture = draw(("red", "star", x, 0.25), ("blue", "circle", 0.5, 0.75))
        return judge(picture, "a star to the left of a circle").partial

    def tinted(share: float) -> float:
        rgb = tuple(
            round(a + share * (b - a)) for a, b in zip(RGB["blue"], RGB["red"], strict=True)
        )
        scene = Scene((Placed("star", "red", 0.5, 0.5, 0.2, 0.0, rgb),), GREY)  # type: ignore[arg-type]
        return judge(render(scene), "a red star").partial

    for credit in ([at(x) for x in (0.8, 0.7, 0.6, 0.5, 0.4)], [tinted(k / 5) for k in range(6)]):
        assert credit == sorted(credit) and len(set(credit)) == len(credit)


@pytest.mark.parametrize("reward", [ShapesStrict(), ShapesPartial()])
def test_a_picture_of_nothing_scores_zero(reward: ShapesStrict) -> None:
    for level in (0.0, 0.5, 1.0):
        score = reward.score(Media(torch.full((1, 3, 64, 64), level)), ["a photo of a star"])
        assert score.valid.all() and score.value.item() == 0.0
        assert score.notes == ("no objects found",)


@pytest.mark.parametrize("reward", [ShapesStrict(), ShapesPartial()])
def test_what_cannot_be_judged_is_unscored(reward: ShapesStrict) -> None:
    good = Media.from_pil([draw(("red", "star", 0.5, 0.5))]).data
    broken, saturated = good.clone(), torch.zeros_like(good)
    broken[0, 0, 5, 5] = torch.nan
    saturated[:, 0] = 1.0
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    media = Media(torch.cat([good, broken, saturated, noise, good]))
    score = reward.score(media, ["a photo of a star"] * 4 + ["a painting of a cow"])
    assert score.valid.tolist() == [True, False, False, False, False]
    assert all(score.notes[1:]) and "a photo of" in score.notes[4]
    assert torch.isfinite(score.value).tolist() == score.valid.tolist()


def test_a_video_is_refused_by_kind() -> None:
    with pytest.raises(ValueError, match="video"):
        ShapesStrict().score(Media(torch.rand(1, 4, 3, 64, 64)), ["a photo of a star"])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 prompts for 1 samples"):
        ShapesPartial().score(Media(torch.rand(1, 3, 64, 64)), ["a", "b"])


def _scenes(count: int, size: int) -> tuple[list[Image.Image], list[str]]:
    rng = random.Random(size)
    specs = [sample_spec(rng, "train") for _ in range(count)]
    return [render(sample_scene(s, rng), size) for s in specs], [caption(s) for s in specs]


@pytest.mark.parametrize("size", [48, 64, 128])
def test_other_sizes(size: int) -> None:
    pictures, prompts = _scenes(200, size)
    assert np.mean([v.strict for v in verify(pixels(pictures), prompts)]) > 0.98


def test_pictures_that_are_not_square() -> None:
    pictures, prompts = _scenes(100, 160)
    images = np.full((100, 200, 160, 3), 0.6, np.float32)  # a grey strip above and below
    images[:, 20:180] = pixels(pictures)
    assert np.mean([v.strict for v in verify(images, prompts)]) > 0.98


@pytest.mark.parametrize(("sigma", "least"), [(0.02, 0.98), (0.05, 0.9)])
def test_weak_noise_is_seen_through(sigma: float, least: float) -> None:
    pictures, prompts = _scenes(200, 64)
    noise = np.random.default_rng(0).normal(0, sigma, (200, 64, 64, 3)).astype(np.float32)
    assert np.mean([v.strict for v in verify(pixels(pictures) + noise, prompts)]) > least


def test_slight_blur_is_seen_through() -> None:
    pictures, prompts = _scenes(200, 64)
    blurred = [p.filter(ImageFilter.GaussianBlur(0.8)) for p in pictures]
    assert np.mean([v.strict for v in verify(pixels(blurred), prompts)]) > 0.95
