"""Regions of the shapes verifiers: every object seen, right or wrong, where it is."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from mmalign.protocols import RegionReward
from mmalign.shapes import Placed, Scene, caption, render, sample_scene, sample_spec
from mmalign.types import Media, Regions
from vision_rewards.factory import load_reward

GREY = ((200, 200, 200), (200, 200, 200))
RGB = {"red": (215, 30, 35), "blue": (35, 75, 205), "yellow": (245, 220, 40)}
NAMES = ("shapes_strict", "shapes_partial")


def draw(*objects: tuple[str, str, float, float]) -> Image.Image:
    """Draw ``(colour, shape, x, y)`` objects of radius 0.17 on plain grey."""
    placed = tuple(Placed(s, c, x, y, 0.17, 0.0, RGB[c]) for c, s, x, y in objects)
    return render(Scene(placed, GREY), 64)


def located(name: str, picture: Image.Image, prompt: str) -> Regions:
    """What a verifier says about one picture."""
    return load_reward(name).regions(Media.from_pil([picture]), [f"a photo of {prompt}"])


@pytest.mark.parametrize("name", NAMES)
def test_boxes_lie_where_objects_were_drawn(name):
    picture = draw(("red", "circle", 0.25, 0.3), ("blue", "square", 0.7, 0.75))
    found = located(name, picture, "a red circle and a blue square")
    assert isinstance(load_reward(name), RegionReward)
    boxes = {r.note: r for r in found.boxes[0]}
    assert boxes.keys() == {"a circle", "a square"}
    assert boxes["a circle"].box == pytest.approx((0.08, 0.13, 0.42, 0.47), abs=0.02)
    square = boxes["a square"].box
    assert ((square[0] + square[2]) / 2, (square[1] + square[3]) / 2) == pytest.approx(
        (0.7, 0.75), abs=0.02
    )
    assert all(r.score > 0.8 for r in boxes.values()) and found.overall > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_wrong_objects_are_told_from_right_ones(name):
    picture = draw(("red", "circle", 0.25, 0.3), ("yellow", "square", 0.7, 0.75))
    found = located(name, picture, "a red circle and a blue square")
    scores = {r.note: r.score for r in found.boxes[0]}
    assert scores["a circle"] > 0.8 > scores["a square"] + 0.5
    assert found.overall < 0.8 and found.valid.all()


@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_asked_for_is_wrong(name):
    picture = draw(("red", "circle", 0.25, 0.3), ("red", "circle", 0.7, 0.75))
    found = located(name, picture, "a red circle")
    scores = sorted(r.score for r in found.boxes[0])
    assert scores[0] == -1.0 and scores[1] > 0.8


def test_wrong_positions_count_against_the_whole_alone():
    picture = draw(("red", "circle", 0.25, 0.5), ("blue", "square", 0.75, 0.5))
    found = located("shapes_strict", picture, "a circle to the right of a square")
    assert [r.score for r in found.boxes[0]] == [1.0, 1.0] and found.overall.item() == -1.0


def test_nothing_seen_has_no_boxes_and_odd_prompts_are_unscored():
    reward = load_reward("shapes_partial")
    pictures = Media(torch.full((2, 3, 64, 64), 0.8))
    found = reward.regions(pictures, ["a photo of a red star", "the meaning of life"])
    assert found.boxes == ((), ()) and found.valid.tolist() == [True, False]
    assert found.overall[0] == -1.0 and "grammar" in found.notes[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_is_the_score_rescaled(name):
    rng = random.Random(0)
    specs = [sample_spec(rng, "test") for _ in range(12)]
    media = Media.from_pil([render(sample_scene(s, rng), 64) for s in specs])
    prompts = [caption(s) for s in specs]
    reward = load_reward(name)
    found, score = reward.regions(media, prompts), reward.score(media, prompts)
    torch.testing.assert_close(found.overall, 2 * score.value - 1)
    assert [len(b) for b in found.boxes] == [s.total for s in specs]
    assert all(r.score > 0.5 for boxes in found.boxes for r in boxes)
