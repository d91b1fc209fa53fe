"""Subjects: objects with a texture of their own, which no caption of the world describes.

A subject is known by :data:`TOKEN` (``a photo of a v star above a red circle``). Its reference
pictures are rendered, it is told from any other object of its shape by the texture alone, and its
prompts follow the split of the world's compositions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from mmalign.registry import unknown
from mmalign.shapes.grammar import (
    COLORS,
    PREFIX,
    RELATIONS,
    SHAPES,
    ObjectSpec,
    PromptSpec,
    caption,
)
from mmalign.shapes.render import render
from mmalign.shapes.scene import Pattern, Scene, sample_scene
from mmalign.shapes.splits import split_of, trainable_pair

TOKEN = "v"  # a letter means nothing here, and is one token: encoders of the world take few
SCHEME = "shapes:"  # what a source of prompts or references begins with: ``shapes:striped_star``


@dataclass(frozen=True)
class Subject:
    """One object of the world: its shape, the name of its ground colour, the pattern on it."""

    shape: str
    color: str
    pattern: Pattern


SUBJECTS: Mapping[str, Subject] = {
    "halved_triangle": Subject("triangle", "blue", Pattern("halves", COLORS["yellow"])),
    "striped_star": Subject("star", "blue", Pattern("stripes", COLORS["yellow"])),
    "checked_square": Subject("square", "red", Pattern("checks", COLORS["cyan"])),
    "ringed_circle": Subject("circle", "green", Pattern("rings", COLORS["pink"])),
}


def subject_of(source: str) -> Subject:
    """The subject that ``shapes:NAME`` names.

    Raises:
        UnknownNameError: there is none of that name.
    """
    name = source.removeprefix(SCHEME)
    if name not in SUBJECTS:
        raise unknown("subject of the shapes world", name, SUBJECTS)
    return SUBJECTS[name]


def subject_scene(subject: Subject, rng: random.Random, spec: PromptSpec | None = None) -> Scene:
    """A scene of ``spec`` (the subject alone by default) whose first object is the subject."""
    spec = spec or PromptSpec((ObjectSpec(subject.shape),))
    scene = sample_scene(spec, rng, trainable_pair)
    objects = list(scene.objects)
    at = next(k for k, o in enumerate(objects) if o.shape == subject.shape)
    objects[at] = replace(
        objects[at], color=subject.color, rgb=COLORS[subject.color], pattern=subject.pattern
    )
    return Scene(tuple(objects), scene.background)


def subject_pictures(source: str, count: int = 4, size: int = 64) -> list[Image.Image]:
    """Reference pictures of ``shapes:NAME``: alone, in other places and on other backgrounds.

    The same on every machine.
    """
    subject = subject_of(source)
    name = source.removeprefix(SCHEME)
    scenes = (subject_scene(subject, random.Random(f"{name} {k}")) for k in range(count))
    return [render(scene, size) for scene in scenes]


def subject_prompts(source: str, split: str = "train") -> list[str]:
    """Every prompt of one split that shows ``shapes:NAME``, alone or beside another object.

    The subject alone belongs to ``train``, as it does for all shapes.
    """
    shape = subject_of(source).shape
    others = [ObjectSpec(s, c) for s in SHAPES if s != shape for c in (None, *COLORS)]
    specs = [PromptSpec((ObjectSpec(shape),))]
    specs += [PromptSpec((ObjectSpec(shape), o), r) for o in others for r in (None, *RELATIONS)]
    chosen = [spec for spec in specs if split_of(spec) == split]
    return [caption(s).replace(f"{PREFIX} a ", f"{PREFIX} a {TOKEN} ", 1) for s in chosen]
