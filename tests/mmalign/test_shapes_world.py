"""The shapes world: grammar, scenes, rendering and splits."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from mmalign.shapes import (
    COLORS,
    RELATIONS,
    SHAPES,
    TASKS,
    CaptionError,
    ObjectSpec,
    PromptSpec,
    caption,
    parse,
    prompts,
    render,
    render_layout,
    sample_scene,
    sample_spec,
    split_of,
)
from mmalign.shapes.scene import BORDER, GAP, RELATION_MARGIN, canonical, related
from mmalign.shapes.splits import SPLITS, held_out_pair, held_out_relation, trainable_pair


def every_spec() -> list[PromptSpec]:
    colors = [None, *COLORS]
    specs = [
        PromptSpec((ObjectSpec(s, c, n),)) for s in SHAPES for c in colors for n in range(1, 5)
    ]
    for a, b in itertools.permutations(SHAPES, 2):
        for c, d in itertools.product(colors, colors):
            pair = (ObjectSpec(a, c), ObjectSpec(b, d))
            specs += [PromptSpec(pair, r) for r in (None, *RELATIONS)]
    return specs


def test_caption_and_parse_are_inverse_on_the_whole_grammar() -> None:
    specs = every_spec()
    texts = [caption(s) for s in specs]
    assert len(set(texts)) == len(specs) > 8000
    assert [parse(t) for t in texts] == specs
    assert {s.task for s in specs} == set(TASKS)


def test_captions_read_as_geneval_writes_them() -> None:
    green, yellow = ObjectSpec("triangle", "green"), ObjectSpec("star", "yellow")
    text = "a photo of a green triangle to the left of a yellow star"
    assert caption(PromptSpec((green, yellow), "left")) == text
    assert caption(PromptSpec((ObjectSpec("cross", "orange", 3),))) == (
        "a photo of three orange crosses"
    )
    assert caption(PromptSpec((ObjectSpec("cross", "orange"),))) == "a photo of an orange cross"
    assert parse("  A photo of a  RED star. ") == PromptSpec((ObjectSpec("star", "red"),))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a drawing of a star", "must start with"),
        ("a photo of a dog", "unknown shape 'dog'"),
        ("a photo of a mauve star", "unknown colour 'mauve'"),
        ("a photo of five stars", "unknown determiner 'five'"),
        ("a photo of two star", "unknown plural 'star'"),
        ("a photo of a star and a star", "different shapes"),
        ("a photo of star", "cannot read"),
        ("a photo of two stars and a circle", "one kind of object"),
        ("", "must start with"),
    ],
)
def test_a_caption_outside_the_grammar_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(CaptionError, match=said):
        parse(text)


@pytest.mark.parametrize("task", TASKS)
def test_scenes_show_what_was_asked_without_overlap(task: str) -> None:
    rng = random.Random(1)
    for _ in range(150):
        spec = sample_spec(rng, "train", task)
        scene = sample_scene(spec, rng, trainable_pair)
        assert spec.task == task and scene.satisfies(spec) and len(scene.objects) == spec.total
        for a, b in itertools.combinations(scene.objects, 2):
            gap = math.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius
            assert gap >= GAP - 1e-9
        for o in scene.objects:
            assert min(o.x, o.y, 1 - o.x, 1 - o.y) >= o.radius + BORDER - 1e-9
            assert not held_out_pair((o.color, o.shape))
        if spec.relation:
            a, b = scene.objects
            assert related(spec.relation, a.x - b.x, a.y - b.y, RELATION_MARGIN)


def test_a_scene_does_not_satisfy_other_compositions() -> None:
    rng = random.Random(2)
    scene = sample_scene(parse("a photo of a red star above a blue circle"), rng)
    assert scene.satisfies(parse("a photo of a blue circle below a red star"))
    assert scene.satisfies(parse("a photo of a star and a circle"))
    for other in (
        "a photo of a red star below a blue circle",
        "a photo of a blue star above a red circle",
        "a photo of a red star",
        "a photo of two stars",
        "a photo of a red star and a blue square",
    ):
        assert not scene.satisfies(parse(other)), other


@pytest.mark.parametrize("size", [8, 32, 64, 200])
def test_rendering_is_deterministic_antialiased_and_of_any_size(size: int) -> None:
    scene = sample_scene(parse("a photo of a red circle"), random.Random(3))
    picture = np.asarray(render(scene, size))
    assert picture.shape == (size, size, 3)
    assert np.array_equal(picture, np.asarray(render(scene, size)))
    if size >= 64:
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 8  # edges blend


def test_rendering_refuses_a_size_that_cannot_hold_a_scene() -> None:
    with pytest.raises(ValueError, match="size 4 is too small"):
        render(sample_scene(parse("a photo of a star"), random.Random(0)), 4)


def test_layout_covers_the_object_and_nothing_else() -> None:
    scene = sample_scene(parse("a photo of a red square"), random.Random(4))
    layout = render_layout(scene) / 255
    area = math.pi * scene.objects[0].radius ** 2
    shape, color = SHAPES.index("square"), len(SHAPES) + list(COLORS).index("red")
    for channel in (shape, color):
        assert 0.6 * area < layout[..., channel].mean() < 1.0 * area
    others = [i for i in range(layout.shape[-1]) if i not in (shape, color)]
    assert not layout[..., others].any()


def test_splits_are_disjoint_and_ignore_the_wording() -> None:
    where: dict[str, set[str]] = {}
    for spec in every_spec():
        if spec.task != "single_object":
            where.setdefault(caption(canonical(spec)), set()).add(split_of(spec))
    assert all(len(splits) == 1 for splits in where.values())
    counts = {s: sum(v == {s} for v in where.values()) / len(where) for s in SPLITS}
    assert counts["train"] > 0.4 and counts["validation"] > 0.04 and counts["test"] > 0.2


def test_whole_compositions_are_held_out_of_training() -> None:
    pairs = [(c, s) for c in COLORS for s in SHAPES if held_out_pair((c, s))]
    assert len(pairs) == 5 and len({c for c, _ in pairs}) == 5
    training = [s for s in every_spec() if split_of(s) == "train"]
    assert not any(held_out_relation(s) for s in training)
    named = [o for s in training for o in s.objects if o.color]
    assert named and not any(held_out_pair((str(o.color), o.shape)) for o in named)
    relations = [s for s in every_spec() if held_out_relation(s)]
    assert relations and all(split_of(s) == "test" for s in relations)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_stable_distinct_and_of_their_split(task: str) -> None:
    for split in SPLITS:
        found = prompts(split, task, 6)
        assert found == prompts(split, task, 6) and len(set(found)) == len(found)
        assert found == prompts(split, task, 12)[: len(found)]
        assert all(parse(p).task == task for p in found)
        if task != "single_object":
            assert all(split_of(parse(p)) == split for p in found)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        prompts("dev", task, 1)
