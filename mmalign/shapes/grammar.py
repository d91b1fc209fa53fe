"""Prompt grammar of the shapes world: a specification, its caption, and back.

The six task families and the wording follow GenEval (Ghosh et al., 2310.11513):
``single_object``, ``two_object``, ``counting``, ``colors``, ``position`` and
``color_attr``.  :func:`caption` and :func:`parse` are exact inverses on every
specification the grammar can express.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")

# Saturated, mutually distant colours: backgrounds are unsaturated, so saturation separates the two.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "cyan": (60, 205, 215),
    "blue": (35, 75, 205),
    "purple": (125, 45, 165),
    "pink": (250, 125, 190),
}

RELATIONS: tuple[str, ...] = ("left", "right", "above", "below")
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
TASKS: tuple[str, ...] = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
)

MAX_OBJECTS = 4
PREFIX = "a photo of"
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_COUNTS = {word: n for n, word in _NUMBERS.items()}
_PLURALS = {**{s: s + "s" for s in SHAPES}, "cross": "crosses"}
_SINGULARS = {plural: shape for shape, plural in _PLURALS.items()}
_PHRASES = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}


class CaptionError(ValueError):
    """A caption, or a specification, that the shapes grammar cannot express."""


@dataclass(frozen=True)
class ObjectSpec:
    """``count`` objects of one shape; ``color=None`` leaves the colour free."""

    shape: str
    color: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise CaptionError(f"unknown shape {self.shape!r}; known shapes: {', '.join(SHAPES)}")
        if self.color is not None and self.color not in COLORS:
            raise CaptionError(f"unknown colour {self.color!r}; known: {', '.join(COLORS)}")
        if not 1 <= self.count <= MAX_OBJECTS:
            raise CaptionError(f"count {self.count} is outside 1..{MAX_OBJECTS}")


@dataclass(frozen=True)
class PromptSpec:
    """What a prompt asks for: one or two object groups and, between two, an optional relation."""

    objects: tuple[ObjectSpec, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise CaptionError(f"a prompt names 1 or 2 object groups, got {len(self.objects)}")
        if self.relation is not None:
            if self.relation not in RELATIONS:
                known = ", ".join(RELATIONS)
                raise CaptionError(f"unknown relation {self.relation!r}; known: {known}")
            if len(self.objects) != 2:
                raise CaptionError(f"relation {self.relation!r} needs two objects")
        if len(self.objects) == 2:
            if self.objects[0].shape == self.objects[1].shape:
                raise CaptionError("two named objects must have different shapes")
            if any(o.count != 1 for o in self.objects):
                raise CaptionError("counting prompts name one kind of object only")

    @property
    def total(self) -> int:
        """Number of objects the picture must show."""
        return sum(o.count for o in self.objects)

    @property
    def task(self) -> str:
        """The GenEval task family this specification belongs to."""
        if self.relation is not None:
            return "position"
        if len(self.objects) == 2:
            return "color_attr" if all(o.color for o in self.objects) else "two_object"
        if self.objects[0].count > 1:
            return "counting"
        return "colors" if self.objects[0].color else "single_object"


def caption(spec: PromptSpec) -> str:
    """GenEval-style caption of ``spec``, e.g. ``a photo of a red star above a blue circle``."""
    names = [_noun_phrase(o) for o in spec.objects]
    if len(names) == 1:
        return f"{PREFIX} {names[0]}"
    joint = _PHRASES[spec.relation] if spec.relation else "and"
    return f"{PREFIX} {names[0]} {joint} {names[1]}"


def parse(text: str) -> PromptSpec:
    """Inverse of :func:`caption`.

    Raises:
        CaptionError: the caption is outside the grammar; the message says which part and what
            would be allowed there.
    """
    words = re.sub(r"\s+", " ", text.strip().lower()).rstrip(".")
    if not words.startswith(PREFIX + " "):
        raise CaptionError(f"caption {text!r} must start with {PREFIX!r}")
    body = words[len(PREFIX) + 1 :]
    for relation, phrase in (*_PHRASES.items(), (None, "and")):
        left, found, right = body.partition(f" {phrase} ")
        if found:
            return PromptSpec((_parse_noun(left, text), _parse_noun(right, text)), relation)
    return PromptSpec((_parse_noun(body, text),))


def _noun_phrase(spec: ObjectSpec) -> str:
    color = f"{spec.color} " if spec.color else ""
    if spec.count > 1:
        return f"{_NUMBERS[spec.count]} {color}{_PLURALS[spec.shape]}"
    article = "an" if color.startswith("o") else "a"
    return f"{article} {color}{spec.shape}"


def _parse_noun(phrase: str, text: str) -> ObjectSpec:
    words = phrase.split()
    if len(words) not in (2, 3):
        raise CaptionError(
            f"cannot read {phrase!r} in caption {text!r}: expected "
            "'<a|an|two|three|four> [colour] <shape>'"
        )
    determiner, noun = words[0], words[-1]
    color = words[1] if len(words) == 3 else None
    if determiner in ("a", "an"):
        return ObjectSpec(noun, color)
    if determiner not in _COUNTS:
        allowed = ", ".join(("a", "an", *_COUNTS))
        raise CaptionError(f"unknown determiner {determiner!r} in {text!r}; allowed: {allowed}")
    if noun not in _SINGULARS:
        known = ", ".join(_SINGULARS)
        raise CaptionError(f"unknown plural {noun!r} in {text!r}; allowed: {known}")
    return ObjectSpec(_SINGULARS[noun], color, _COUNTS[determiner])
