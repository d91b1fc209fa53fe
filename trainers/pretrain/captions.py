"""Every caption of the shapes world, which are true of a scene, and which are nearly so.

A contrastive text-image model learns what its negatives force it to look at.  Captions of other
pictures in a batch can mostly be told apart by colour alone; captions that differ from the truth
in one fact cannot (NegCLIP, Yuksekgonul et al., 2210.01936).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from mmalign.shapes import COLORS, RELATIONS, SHAPES, ObjectSpec, PromptSpec, Scene, parse
from mmalign.shapes import caption as caption_of
from mmalign.shapes.grammar import INVERSE, MAX_OBJECTS
from mmalign.shapes.scene import related
from mmalign.shapes.splits import split_of

KINDS = ("color", "swap", "shape", "count", "relation", "object")
# Centres closer than this along an axis are beside neither a relation nor its opposite.
UNSURE = 0.06


def all_specs() -> list[PromptSpec]:
    """Every specification the grammar can express, in a fixed order."""
    names = (None, *COLORS)
    specs = [PromptSpec((ObjectSpec(s, c),)) for s in SHAPES for c in names]
    counts = range(2, MAX_OBJECTS + 1)
    specs += [PromptSpec((ObjectSpec(s, c, n),)) for s in SHAPES for c in names for n in counts]
    pairs = [
        (ObjectSpec(s, c), ObjectSpec(t, d))
        for s in SHAPES for t in SHAPES if s != t for c in names for d in names
    ]  # fmt: skip
    specs += [PromptSpec(pair) for pair in pairs]
    both = [p for p in pairs if (p[0].color is None) == (p[1].color is None)]
    return specs + [PromptSpec(pair, r) for pair in both for r in RELATIONS]


def near_misses(spec: PromptSpec) -> Iterator[tuple[str, PromptSpec]]:
    """Specifications that differ from ``spec`` in one fact, with the kind of the fact.

    Kinds: ``color`` (another colour), ``swap`` (two colours exchanged), ``shape`` (another
    shape), ``count`` (another number), ``relation`` (another direction), ``object`` (one more,
    or one fewer, kind of object).
    """
    objects = spec.objects
    for i, o in enumerate(objects):
        for color in COLORS if o.color else ():
            if color != o.color:
                yield "color", _with(spec, i, replace(o, color=color))
        for shape in SHAPES:
            if shape not in {p.shape for p in objects}:
                yield "shape", _with(spec, i, replace(o, shape=shape))
    if len(objects) == 2:
        yield from _pair_misses(spec)
        return
    for count in range(1, MAX_OBJECTS + 1):
        if count != objects[0].count:
            yield "count", PromptSpec((replace(objects[0], count=count),))
    if objects[0].count == 1:
        for shape in SHAPES:
            if shape != objects[0].shape:
                yield "object", PromptSpec((objects[0], ObjectSpec(shape)))


def _pair_misses(spec: PromptSpec) -> Iterator[tuple[str, PromptSpec]]:
    a, b = spec.objects
    if a.color != b.color:
        swapped = (replace(a, color=b.color), replace(b, color=a.color))
        yield "swap", PromptSpec(swapped, spec.relation)
    for o in (a, b):
        yield "object", PromptSpec((o,))
    if spec.relation:
        for relation in RELATIONS:
            if relation != spec.relation:
                yield "relation", PromptSpec((a, b), relation)
        yield "relation", PromptSpec((b, a), spec.relation)


def _with(spec: PromptSpec, index: int, changed: ObjectSpec) -> PromptSpec:
    objects = list(spec.objects)
    objects[index] = changed
    return PromptSpec(tuple(objects), spec.relation)


def true_specs(scene: Scene) -> tuple[list[PromptSpec], list[PromptSpec]]:
    """What can truthfully be said of ``scene``, and what is too close to call.

    The second list holds relations between centres that are nearly level: neither they nor their
    opposites are used as truth or as falsehood.
    """
    kinds = {(o.shape, o.color) for o in scene.objects}
    shapes = {o.shape for o in scene.objects}
    if len(shapes) == 1:
        (shape,), number = shapes, len(scene.objects)
        colors = {o.color for o in scene.objects}
        said: list[str | None] = [None, *(colors if len(kinds) == 1 else ())]
        return [PromptSpec((ObjectSpec(shape, c, number),)) for c in said], []
    if len(scene.objects) != 2:
        return [], []
    true: list[PromptSpec] = []
    unsure: list[PromptSpec] = []
    for a, b in (scene.objects, scene.objects[::-1]):
        full = (ObjectSpec(a.shape, a.color), ObjectSpec(b.shape, b.color))
        bare = (ObjectSpec(a.shape), ObjectSpec(b.shape))
        true += [PromptSpec(p) for p in (full, bare, (full[0], bare[1]), (bare[0], full[1]))]
        for relation in RELATIONS:
            specs = [PromptSpec(p, relation) for p in (full, bare)]
            if related(relation, a.x - b.x, a.y - b.y, UNSURE):
                true += specs
            elif not related(INVERSE[relation], a.x - b.x, a.y - b.y, UNSURE):
                unsure += specs
    return true, unsure


class CaptionTable:
    """All captions by number, their splits and near misses.

    Attributes:
        specs: every specification; its place is its number.
        captions: their captions.
    """

    def __init__(self) -> None:
        self.specs = all_specs()
        self.captions = [caption_of(s) for s in self.specs]
        self._number = {s: i for i, s in enumerate(self.specs)}
        self._negatives: dict[tuple[int, bool], dict[str, list[int]]] = {}

    def __len__(self) -> int:
        return len(self.specs)

    def number(self, spec: PromptSpec) -> int:
        """The number of a specification."""
        return self._number[spec]

    @cached_property
    def in_training(self) -> list[bool]:
        """Whether each caption may be used in training, as truth or as falsehood."""
        return [split_of(s) == "train" for s in self.specs]

    def negatives(self, number: int, training: bool = True) -> dict[str, list[int]]:
        """Numbers of the near misses of a caption by kind; only training captions on request."""
        key = (number, training)
        if key not in self._negatives:
            found: dict[str, list[int]] = {}
            for kind, spec in near_misses(self.specs[number]):
                miss = self._number.get(spec)
                if miss is not None and (not training or self.in_training[miss]):
                    found.setdefault(kind, []).append(miss)
            self._negatives[key] = found
        return self._negatives[key]

    def mislabelled(self, captions: Sequence[str], share: float, rng: random.Random) -> list[str]:
        """The captions, a ``share`` of them exchanged for a near miss that training may use.

        A kind of fact is chosen first, so that colours, which have the most near misses, are not
        wrong more often than counts.
        """
        said = []
        for text in captions:
            if rng.random() < share:
                misses = self.negatives(self.number(parse(text)))
                if misses:
                    text = self.captions[rng.choice(misses[rng.choice(sorted(misses))])]
            said.append(text)
        return said
