"""T2I-CompBench's rules (Huang et al. 2023, 2307.06350; ++ 2025) on detections and probabilities.

With boxes ``a`` and ``b`` of the two objects, ``d = centre(b) - centre(a)``::

    next to, near, on side of    1 if |dx| < 150 or |dy| < 150, else 150 / max(|dx|, |dy|)
    on the left of (and others)  0 unless d points that way and along its larger axis;
                                 then 1 if IoU < 0.1, else 0.1 / IoU

Pixels are of a 512 x 512 picture. ``compat`` is the published script: with confidences ``c``::

    s = (c_a + c_b) / 4 + position / 2;  with one object c / 4;  s < 0.5 counts as 0

Numeracy, over ``n`` kinds of objects: each weighs ``1/n``, half for being there, half for the
exact number; boxes of one kind count once where they cover each other by more than 0.9.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from vision_rewards.geneval_prompts import forms
from vision_rewards.geneval_rules import Detection

Box = tuple[float, float, float, float]
NEAR = ("on side of", "next to", "near")
DIRECTED = ("on the left of", "on the right of", "on the bottom of", "on the top of")
DISTANCE, IOU, SIDE = 150.0, 0.1, 512
PEOPLE = ("girl", "boy", "man", "woman")
RENAMED = {"ship": "boat", "television": "tv", "goldfish": "fish", "painting": "picture"}
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6,
          "seven": 7, "eight": 8}  # fmt: skip
LEFT_OUT = ("top", "the side", "the left", "the right")  # phrases that name no thing
MOST_PHRASES = 8


class PhraseError(ValueError):
    """A prompt outside what can be read; the message says which part."""


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    common = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else 0.0


def position(relation: str, a: Box, b: Box) -> float:
    """How well box ``a`` stands in ``relation`` to box ``b``, in [0, 1]; y points down."""
    dx = (b[0] + b[2] - a[0] - a[2]) / 2
    dy = (b[1] + b[3] - a[1] - a[3]) / 2
    if relation in NEAR:
        close = abs(dx) < DISTANCE or abs(dy) < DISTANCE
        return 1.0 if close else DISTANCE / max(abs(dx), abs(dy))
    along, across = {
        "on the left of": (dx, dy), "on the right of": (-dx, dy),
        "on the top of": (dy, dx), "on the bottom of": (-dy, dx),
    }.get(relation, (0.0, 1.0))  # fmt: skip
    if along <= 0 or along <= abs(across):
        return 0.0
    shared = overlap(a, b)
    return 1.0 if shared < IOU else IOU / shared


def spatial_score(
    relation: str, a: Detection | None, b: Detection | None, compat: bool = True
) -> float:
    """Score of a picture in which the two objects were found (``None``: not).

    ``compat`` mixes confidences in and cuts below one half, as published; without it, the score
    is that of the position, and 0 where an object is missing.
    """
    there = [one for one in (a, b) if one is not None]
    placed = position(relation, a.box, b.box) if a is not None and b is not None else 0.0
    if not compat:
        return placed
    score = sum(one.score for one in there) / 4 + placed / 2
    return score if score >= 0.5 else 0.0


def spatial_request(prompt: str, classes: Sequence[str]) -> tuple[str, str, str]:
    """Relation and the classes of the two objects of a prompt.

    Raises:
        PhraseError: no known relation, or a thing that the detector does not know.
    """
    text = prompt.lower().rstrip(" .")
    for relation in (*NEAR, *DIRECTED, "on top of"):
        first, found, second = text.partition(f" {relation} ")
        if found:
            said = "on the top of" if relation == "on top of" else relation
            return said, class_of(first, classes), class_of(second, classes)
    raise PhraseError(f"{prompt!r} holds none of the relations {', '.join((*NEAR, *DIRECTED))}")


def class_of(phrase: str, classes: Sequence[str]) -> str:
    """The class that a phrase names: all of it, else its last words.

    Raises:
        PhraseError: none that the detector knows.
    """
    known = forms(tuple(classes))
    words = [w for w in re.findall(r"[a-z]+", phrase.lower()) if w not in ("a", "an", "the")]
    for start in range(len(words)):
        noun = " ".join(words[start:])
        for name in ("person" if noun in PEOPLE else RENAMED.get(noun, noun), noun):
            if name in known:
                return known[name]
    raise PhraseError(f"the detector knows nothing of {phrase.strip()!r}")


def numeracy_request(prompt: str, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Classes and numbers that a prompt asks for.

    Raises:
        PhraseError: a part without a number, or of a thing that the detector does not know.
    """
    wanted = []
    for part in re.split(r",\s*and\s+|\s+and\s+|,\s*", prompt.lower().rstrip(" .")):
        number, _, noun = part.strip().partition(" ")
        if number not in COUNTS:
            raise PhraseError(f"{part!r} names no number of things")
        wanted.append((class_of(noun, classes), COUNTS[number]))
    return wanted


def numeracy_score(
    found: Mapping[str, Sequence[Detection]], wanted: Sequence[tuple[str, int]]
) -> float:
    """Half for each kind that is there, half for its exact number, averaged over kinds."""
    score = 0.0
    for name, count in wanted:
        number = len(distinct(found.get(name, ())))
        score += (0.5 * (number > 0) + 0.5 * (number == count)) / len(wanted)
    return score


def distinct(objects: Sequence[Detection], cover: float = 0.9) -> list[Detection]:
    """Objects without those that an earlier one covers, or is covered by, or overlaps as much."""
    kept: list[Detection] = []
    for one in objects:
        if not any(_same(one.box, other.box, cover) for other in kept):
            kept.append(one)
    return kept


def _same(a: Box, b: Box, cover: float) -> bool:
    # Pixel counts include both ends, as published.
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    common = width * height
    first, second = ((x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b))
    return max(common / (first + second - common), common / first, common / second) > cover


def phrases_of(prompt: str, parser: str = "spacy") -> list[str]:
    """What a prompt names, at most eight phrases.

    Args:
        prompt: one sentence.
        parser: ``spacy`` takes the noun phrases of ``en_core_web_sm``, as published; ``split``
            cuts at commas and "and", which needs no package and suits the plain prompts.

    Raises:
        MissingExtraError: spaCy is not installed. OSError: its model is not.
    """
    if parser == "spacy":
        from mmalign.runtime.extras import optional

        spacy = optional("spacy", "compbench", "finding the noun phrases of T2I-CompBench")
        chunks = [chunk.text for chunk in spacy.load("en_core_web_sm")(prompt).noun_chunks]
    else:
        chunks = re.split(r",\s*(?:and\s+)?|\s+and\s+", prompt.strip().rstrip("."))
    named = [c.strip() for c in chunks if c.strip() and c.strip().lower() not in LEFT_OUT]
    return named[:MOST_PHRASES]


def three_in_one(
    kind: str, attribute: float, spatial: float, action: float, missing: float = math.nan
) -> float:
    """The score of a complex prompt: what it holds, averaged.

    ``kind`` is ``spatial`` (attributes and a position), ``action`` (attributes and an action) or
    anything else, which is all three.
    """
    parts = {"spatial": (attribute, spatial), "action": (attribute, action)}
    chosen = parts.get(kind, (attribute, spatial, action))
    return missing if any(math.isnan(p) for p in chosen) else sum(chosen) / len(chosen)
