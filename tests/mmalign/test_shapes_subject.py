"""Subjects of the shapes world: a texture in the object's frame, and nothing else changed."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmalign.policies.load import load_policy
from mmalign.registry import UnknownNameError
from mmalign.shapes import COLORS, caption, parse, render, sample_scene, split_of
from mmalign.shapes.scene import Pattern, Placed, Scene
from mmalign.shapes.subject import (
    SUBJECTS,
    TOKEN,
    subject_pictures,
    subject_prompts,
    subject_scene,
)

GREY = ((128, 128, 128), (128, 128, 128))
PROMPTS = ("a photo of a star", "a photo of four red circles", "a photo of a cross above a square")
# Of the pictures that these prompts and seeds gave before there were textures.
PLAIN = "c6ee5a88d70d1edd"


def test_pictures_without_a_subject_are_as_they_were():
    found = hashlib.sha256()
    for k in range(12):
        scene = sample_scene(parse(PROMPTS[k % 3]), random.Random(k))
        found.update(np.asarray(render(scene)).tobytes())
    assert found.hexdigest()[:16] == PLAIN


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_a_texture_keeps_the_outline(name):
    subject = SUBJECTS[name]
    scene = subject_scene(subject, random.Random(1))
    (placed,) = scene.objects
    plain = Scene((replace(placed, pattern=None),), scene.background)
    one, two = (np.asarray(render(s)).astype(int) for s in (scene, plain))
    empty = np.asarray(render(Scene((), scene.background))).astype(int)
    inside = (two != empty).any(-1)
    assert ((one == two) | inside[..., None]).all()
    near = {c: (np.abs(one - np.array(c)).max(-1) < 3) & inside
            for c in (placed.rgb, subject.pattern.rgb)}  # fmt: skip
    shares = [mask.sum() / inside.sum() for mask in near.values()]
    assert min(shares) > 0.1 and sum(shares) > 0.4  # the rest is antialiased


def test_a_texture_moves_grows_and_turns_with_its_object():
    pattern = Pattern("stripes", COLORS["yellow"])
    placed = Placed("square", "blue", 0.5, 0.5, 0.4, 0.0, COLORS["blue"], pattern)

    def drawn(**changes) -> np.ndarray:
        return np.asarray(render(Scene((replace(placed, **changes),), GREY))).astype(int)

    turned = np.asarray(Image.fromarray(drawn().astype(np.uint8)).rotate(90)).astype(int)
    assert np.abs(drawn(rotation=-90.0) - turned).mean() < 3
    assert np.abs(drawn() - turned).mean() > 20  # stripes do lie otherwise then
    moved = np.roll(drawn(radius=0.25), (8, -8), (0, 1))
    assert np.abs(drawn(radius=0.25, x=0.375, y=0.625) - moved).max() == 0
    small = drawn(radius=0.2)[16:48, 16:48]
    big = np.asarray(Image.fromarray(drawn().astype(np.uint8)).reduce(2)).astype(int)
    assert np.abs(small - big).mean() < 3


def test_reference_pictures():
    pictures = subject_pictures("shapes:striped_star", 5)
    assert len({p.tobytes() for p in pictures}) == 5
    again = subject_pictures("shapes:striped_star", 3)
    assert [p.tobytes() for p in again] == [p.tobytes() for p in pictures[:3]]
    assert subject_pictures("shapes:striped_star", 1, 32)[0].size == (32, 32)
    with pytest.raises(UnknownNameError, match="striped_star"):
        subject_pictures("shapes:stripped_star")


def test_prompts_follow_the_split():
    lists = {s: subject_prompts("shapes:striped_star", s) for s in ("train", "validation", "test")}
    every = [p for found in lists.values() for p in found]
    assert len(every) == len(set(every)) == 1 + 4 * 9 * 5
    for split, found in lists.items():
        for prompt in found:
            assert prompt.startswith(f"a photo of a {TOKEN} star")
            spec = parse(prompt.replace(f"{TOKEN} ", ""))
            assert split_of(spec) == split and caption(spec) == prompt.replace(f"{TOKEN} ", "")
    policy = load_policy("shapes-flow", device="cpu")
    assert all(policy.fits(prompt) for prompt in every)
    assert len(lists["train"]) > 80 and len(lists["validation"]) >= 12
    scene = subject_scene(SUBJECTS["striped_star"], random.Random(0), parse(PROMPTS[0]))
    assert scene.satisfies(parse("a photo of a blue star"))
