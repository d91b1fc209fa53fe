"""Scenes: concrete placements of coloured shapes on a background, drawn from a specification."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mmalign.shapes.grammar import COLORS, INVERSE, RELATIONS, SHAPES, ObjectSpec, PromptSpec

# Radii (as a share of the picture side) by number of objects: as large as random placement
# without overlap allows, because at 64 pixels small shapes are what an autoencoder loses first.
RADIUS = {1: (0.19, 0.30), 2: (0.165, 0.22), 3: (0.15, 0.185), 4: (0.145, 0.165)}
GAP = 0.055  # smallest distance between two outlines, share of the side
BORDER = 0.02  # smallest distance to the picture's edge
RELATION_MARGIN = 0.12  # a drawn relation holds by at least this distance between centres
ROTATION = 14.0  # degrees either way; keeps every shape's name unambiguous

Pair = tuple[str, str]


@dataclass(frozen=True)
class Pattern:
    """A second colour on an object, in the object's frame."""

    kind: Literal["stripes", "checks", "rings", "halves"]
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Placed:
    """One object; centre and radius are shares of the picture side, y grows downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    rotation: float
    rgb: tuple[int, int, int]
    pattern: Pattern | None = None


@dataclass(frozen=True)
class Scene:
    """A picture before rendering. ``background`` holds the top-left and bottom-right colours."""

    objects: tuple[Placed, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int]]

    def satisfies(self, spec: PromptSpec) -> bool:
        """Ground truth of "this scene shows exactly what ``spec`` asks for" (nothing extra)."""
        if len(self.objects) != spec.total:
            return False
        first = spec.objects[0]
        if len(spec.objects) == 1:
            return all(_matches(o, first) for o in self.objects)
        a, b = self.objects
        if not (_matches(a, first) and _matches(b, spec.objects[1])):
            a, b = b, a
        if not (_matches(a, first) and _matches(b, spec.objects[1])):
            return False
        return spec.relation is None or related(spec.relation, a.x - b.x, a.y - b.y, 0.0)


def related(relation: str, dx: float, dy: float, margin: float) -> bool:
    """Whether an object displaced by ``(dx, dy)`` from another stands in ``relation`` to it."""
    offset = {"left": -dx, "right": dx, "above": -dy, "below": dy}[relation]
    return offset > margin


def sample_scene(
    spec: PromptSpec, rng: random.Random, allow: Callable[[Pair], bool] | None = None
) -> Scene:
    """Draw a scene that satisfies ``spec``.

    ``allow((color, shape))`` restricts the colours given to objects whose colour the prompt leaves
    free, so that held-out pairs stay out of training pictures.
    """
    wanted = [o for o in spec.objects for _ in range(o.count)]
    pairs = [(_pick_color(o, rng, allow), o.shape) for o in wanted]
    radii = [rng.uniform(*RADIUS[len(wanted)]) for _ in wanted]
    centres = _place(radii, spec.relation, rng)
    placed = tuple(
        Placed(shape, color, x, y, r, rng.uniform(-ROTATION, ROTATION), _jitter(color, rng))
        for (color, shape), (x, y), r in zip(pairs, centres, radii, strict=True)
    )
    return Scene(placed, _background(rng))


def random_spec(task: str, rng: random.Random) -> PromptSpec:
    """A specification drawn from one task family, uniformly over its free choices."""
    color = lambda p=1.0: rng.choice(list(COLORS)) if rng.random() < p else None  # noqa: E731
    shape, other = rng.sample(SHAPES, 2)
    if task == "single_object":
        return PromptSpec((ObjectSpec(shape),))
    if task == "colors":
        return PromptSpec((ObjectSpec(shape, color()),))
    if task == "counting":
        return PromptSpec((ObjectSpec(shape, color(0.5), rng.randint(2, 4)),))
    if task == "two_object":
        colors = [color(0.5), None]
        rng.shuffle(colors)
        return PromptSpec((ObjectSpec(shape, colors[0]), ObjectSpec(other, colors[1])))
    if task == "color_attr":
        return PromptSpec((ObjectSpec(shape, color()), ObjectSpec(other, color())))
    if task == "position":
        share = 1.0 if rng.random() < 0.5 else 0.0
        objects = (ObjectSpec(shape, color(share)), ObjectSpec(other, color(share)))
        return PromptSpec(objects, rng.choice(RELATIONS))
    from mmalign.shapes.grammar import TASKS

    raise ValueError(f"unknown task {task!r}; known tasks: {', '.join(TASKS)}")


def canonical(spec: PromptSpec) -> PromptSpec:
    """The representative of all wordings of one composition: order does not matter."""
    if len(spec.objects) == 1:
        return spec
    a, b = spec.objects
    if (a.shape, a.color or "") <= (b.shape, b.color or ""):
        return spec
    return PromptSpec((b, a), INVERSE[spec.relation] if spec.relation else None)


def _matches(placed: Placed, spec: ObjectSpec) -> bool:
    return placed.shape == spec.shape and spec.color in (None, placed.color)


def _pick_color(spec: ObjectSpec, rng: random.Random, allow: Callable[[Pair], bool] | None) -> str:
    if spec.color is not None:
        return spec.color
    names = [c for c in COLORS if allow is None or allow((c, spec.shape))]
    return rng.choice(names)


def _place(
    radii: list[float], relation: str | None, rng: random.Random
) -> list[tuple[float, float]]:
    """Non-overlapping centres by rejection; restarts rather than crowding a corner."""
    while True:
        centres: list[tuple[float, float]] = []
        for r in radii:
            for _ in range(30):
                edge = r + BORDER
                x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
                if all(
                    (x - u) ** 2 + (y - v) ** 2 >= (r + s + GAP) ** 2
                    for (u, v), s in zip(centres, radii, strict=False)
                ):
                    centres.append((x, y))
                    break
        if len(centres) < len(radii):
            continue
        if relation is not None:
            (ax, ay), (bx, by) = centres
            if not related(relation, ax - bx, ay - by, RELATION_MARGIN):
                continue
        return centres


def _jitter(color: str, rng: random.Random) -> tuple[int, int, int]:
    shade = rng.uniform(0.92, 1.06)
    r, g, b = (min(255, max(0, round(c * shade + rng.uniform(-6, 6)))) for c in COLORS[color])
    return r, g, b


def _background(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Near-grey, from dark to white; half are gradients."""

    def grey() -> tuple[int, int, int]:
        level = rng.uniform(25, 245)
        r, g, b = (round(level + rng.uniform(-8, 8)) for _ in range(3))
        return r, g, b

    first = grey()
    return (first, grey()) if rng.random() < 0.5 else (first, first)
