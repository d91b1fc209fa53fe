"""The shapes world's verifiers: does a picture show exactly what its prompt asks for?

``shapes_strict`` applies GenEval's rules (Ghosh et al., 2310.11513) to an exact inventory and says
0 or 1; ``shapes_partial`` grades the same facts smoothly, so that a picture that is nearly right is
worth more than one that is not.  Both rest on :func:`verify`, which looks at each picture once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmalign.protocols import RewardInfo
from mmalign.shapes import COLORS, SHAPES, CaptionError, ObjectSpec, PromptSpec, parse
from mmalign.shapes.scene import related
from mmalign.types import Media, Region, Regions, Score
from vision_rewards import shapes_vision
from vision_rewards.base import checked_call
from vision_rewards.cards import info_of
from vision_rewards.shapes_vision import Detection, View, look

VERSION = "1"  # part of the identity: a changed rule is a changed version
RELATION_MARGIN = 0.03  # of the side; scenes are drawn with 0.12, so near-ties are nobody's truth
PARTS = ("count", "shape", "color", "relation")
PASS_FLOOR, FAIL_CEILING = 0.9, 0.88  # partial credit: passing pictures above, failing ones below
CHUNK = 64  # pictures looked at together; bounds memory
CONSIDERED = 6  # detections matched with the wanted objects, largest first

_COUNT_DECAY = 0.35  # each missing or extra object multiplies partial credit by exp(-0.35) = 0.70
_SHAPE_SHARE, _RELATION_SHARE = 0.6, 0.35
_COLOR_INDEX = {name: i for i, name in enumerate(COLORS)}


@dataclass(frozen=True)
class Verdict:
    """What the verifiers say about one picture.

    Attributes:
        strict: every rule holds.
        partial: graded credit in [0, 1]; at least 0.9 exactly where ``strict``.
        parts: ``count``, ``shape``, ``color``, ``relation``, each 0 or 1 (1 where not asked).
        graded: the same four, each in [0, 1].
        note: what is wrong, in words; empty where nothing is.
        valid: ``False`` where the prompt or the picture cannot be judged.
    """

    strict: bool
    partial: float
    parts: Mapping[str, float]
    graded: Mapping[str, float]
    note: str = ""
    valid: bool = True


def verify(images: np.ndarray, prompts: Sequence[str]) -> list[Verdict]:
    """Judge each picture against its prompt.

    Args:
        images: ``(B, H, W, 3)`` float in [0, 1].
        prompts: ``B`` captions of the shapes grammar; one outside it gives ``valid=False``.

    Raises:
        ValueError: ``images`` is not ``(B, H, W, 3)``, or the lengths differ.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} pictures")
    return [_verdict(v, p) for v, p in zip(_views(images), prompts, strict=True)]


def _views(images: np.ndarray) -> list[View]:
    starts = range(0, len(images), CHUNK)
    return [view for start in starts for view in look(images[start : start + CHUNK])]


def _verdict(view: View, prompt: str) -> Verdict:
    try:
        spec = parse(prompt)
    except CaptionError as error:
        return _unjudged(f"prompt outside the shapes grammar: {error}")
    if view.problem is not None:
        return _unjudged(view.problem)
    return judge(view.detections, spec)


def _unjudged(note: str) -> Verdict:
    empty = dict.fromkeys(PARTS, math.nan)
    return Verdict(False, math.nan, empty, empty, note, valid=False)


def judge(found: Sequence[Detection], spec: PromptSpec) -> Verdict:
    """Judge detections against a specification, under the matching that favours the picture."""
    if not found:
        zero = dict.fromkeys(PARTS, 0.0)
        return Verdict(False, 0.0, zero, zero, "no objects found")
    best = _best(found, spec)
    strict = best.passes
    credit = PASS_FLOOR + (1 - PASS_FLOOR) * best.total if strict else FAIL_CEILING * best.total
    note = "" if strict else _explain(best, found, spec)
    return Verdict(strict, credit, best.parts, best.graded, note)


def _best(found: Sequence[Detection], spec: PromptSpec) -> _Matching:
    """The matching that favours the picture most; something must have been found."""
    best: _Matching | None = None
    for chosen in _assignments(found, spec):
        matching = _Matching.of(chosen, len(found), spec)
        if best is None or matching.rank > best.rank:
            best = matching
    assert best is not None
    return best


def _assignments(
    found: Sequence[Detection], spec: PromptSpec
) -> Iterator[list[tuple[ObjectSpec, Detection | None]]]:
    """Ways to give each wanted object a detection of its own, or none where too few were found."""
    seen = sorted(found, key=lambda d: -d.area)[:CONSIDERED]
    if len(spec.objects) == 1:
        # Wanted objects are alike, so the best ones in order are the best assignment.
        wanted = spec.objects[0]
        order = sorted(seen, key=lambda d: (_fits(wanted, d), _object_credit(wanted, d)[2]))
        slots: list[Detection | None] = [*order[::-1], *[None] * spec.total]
        yield [(wanted, d) for d in slots[: spec.total]]
        return
    padded: list[Detection | None] = [*seen, *[None] * (spec.total - len(seen))]
    for pair in itertools.permutations(padded, 2):
        yield list(zip(spec.objects, pair, strict=True))


@dataclass(frozen=True)
class _Matching:
    """One assignment with its rules checked (``parts``) and graded."""

    pairs: list[tuple[ObjectSpec, Detection | None]]
    parts: dict[str, float]
    graded: dict[str, float]
    total: float
    passes: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", all(v == 1.0 for v in self.parts.values()))

    @property
    def rank(self) -> tuple[bool, float]:
        return self.passes, self.total

    @staticmethod
    def of(
        pairs: list[tuple[ObjectSpec, Detection | None]], found: int, spec: PromptSpec
    ) -> _Matching:
        terms = [_object_credit(w, d) for w, d in pairs]
        colors = [c for (w, _), (_, c, _) in zip(pairs, terms, strict=True) if w.color]
        graded = {
            "count": math.exp(-_COUNT_DECAY * abs(found - spec.total)),
            "shape": sum(t[0] for t in terms) / len(terms),
            "color": sum(colors) / len(colors) if colors else 1.0,
            "relation": 1.0,
        }
        total = sum(t[2] for t in terms) / len(terms)
        if spec.relation is not None:
            placed = _relation_credit(spec.relation, pairs[0][1], pairs[1][1])
            # Position counts only as far as the objects that stand there are the ones asked for.
            graded["relation"] = placed * min(t[0] for t in terms)
            total += _RELATION_SHARE * (graded["relation"] - total)
        return _Matching(pairs, _rules(pairs, found, spec), graded, total * graded["count"])


def _rules(
    pairs: list[tuple[ObjectSpec, Detection | None]], found: int, spec: PromptSpec
) -> dict[str, float]:
    shape = all(d is not None and d.shape == w.shape for w, d in pairs)
    color = all(d is not None and d.color == w.color for w, d in pairs if w.color)
    relation = True
    if spec.relation is not None:
        a, b = pairs[0][1], pairs[1][1]
        relation = shape and _offset(spec.relation, a, b) > RELATION_MARGIN
    flags = (found == spec.total, shape, color, relation)
    return dict(zip(PARTS, map(float, flags), strict=True))


def _fits(wanted: ObjectSpec, d: Detection) -> bool:
    return d.shape == wanted.shape and wanted.color in (None, d.color)


def _object_credit(wanted: ObjectSpec, d: Detection | None) -> tuple[float, float, float]:
    """Graded shape, colour, and their combination; colour is 1 where it is free."""
    if d is None:
        return 0.0, 0.0, 0.0
    shape = _shape_credit(d, wanted.shape)
    if wanted.color is None:
        return shape, 1.0, shape
    color = _color_credit(d, wanted.color)
    # A colour is worth more on the right shape: an extra blob must not stand in for the object.
    worth = (1 - _SHAPE_SHARE) * color * (0.5 + 0.5 * shape)
    return shape, color, _SHAPE_SHARE * shape + worth


def _shape_credit(d: Detection, shape: str) -> float:
    """Overlap with the wanted shape, times how clearly it beats every other shape."""
    ious = d.shape_iou.tolist()
    wanted = ious.pop(SHAPES.index(shape))
    clear = 1.0 / (1.0 + math.exp(-(wanted - max(ious)) / 0.04))
    return _ramp(wanted, 0.3, 0.85) * (0.3 + 0.7 * clear)


def _color_credit(d: Detection, color: str) -> float:
    """Nearness to the wanted colour, how clearly it is the nearest, and how uniform it is."""
    distances = d.color_distance.tolist()
    wanted = distances.pop(_COLOR_INDEX[color])
    near = 1.0 - _ramp(wanted, 0.1, 0.9)
    clear = _ramp(min(distances) - wanted, -0.4, 0.1)
    return near * (0.3 + 0.7 * clear) * (0.5 + 0.5 * _ramp(d.uniform, 0.3, 0.9))


def _relation_credit(relation: str, a: Detection | None, b: Detection | None) -> float:
    """Rises from a clear violation to the distance that drawn scenes keep."""
    if a is None or b is None:
        return 0.0
    return _ramp(_offset(relation, a, b), -0.4, 0.12)


def _offset(relation: str, a: Detection | None, b: Detection | None) -> float:
    """Signed distance by which ``a`` stands in ``relation`` to ``b``, as a share of the side."""
    if a is None or b is None:
        return -math.inf
    dx, dy = a.x - b.x, a.y - b.y
    size = abs(dx) if relation in ("left", "right") else abs(dy)
    return size if related(relation, dx, dy, 0.0) else -size


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _explain(best: _Matching, found: Sequence[Detection], spec: PromptSpec) -> str:
    """What is wrong, in words, most basic first."""
    said = []
    if len(found) != spec.total:
        noun = "object" if spec.total == 1 else "objects"
        said.append(f"expected {spec.total} {noun}, found {len(found)}")
    for wanted, d in best.pairs:
        if d is None:
            said.append(f"{wanted.shape} is missing")
        elif d.shape != wanted.shape:
            said.append(f"expected a {wanted.shape}, found {_name(d)}")
        elif wanted.color is not None and d.color != wanted.color:
            color = d.color or "of no known colour"
            said.append(f"{wanted.shape} is {color}, expected {wanted.color}")
    if best.parts["shape"] == 1.0 and best.parts["relation"] == 0.0:
        phrase = {"left": "left of", "right": "right of"}.get(spec.relation or "", spec.relation)
        a, b = (o.shape for o in spec.objects)
        said.append(f"{a} is not {phrase} {b}")
    return "; ".join(said)


def _name(d: Detection) -> str:
    return f"a {d.shape}" if d.shape else "an object of no known shape"


class _ShapesReward:
    """What both verifiers share: pictures in, verdicts out."""

    info: RewardInfo

    @property
    def identity(self) -> str:
        """Name, rule version and a digest of every threshold in use."""
        return f"{self.info.name}@{VERSION}-{_settings_digest()}"

    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        """Score images ``(B, 3, H, W)``; ``valid=False`` where prompt or picture is unjudgeable.

        Raises:
            ValueError: a call that could never work (see
                :func:`~vision_rewards.base.checked_call`).
        """
        checked_call(self.info, media, prompts, context)
        verdicts = verify(_pixels(media), prompts)
        rows = [self._read(v) for v in verdicts]
        device = media.data.device
        columns = {p: torch.tensor([r[1][p] for r in rows], device=device) for p in PARTS}
        return Score(
            torch.tensor([r[0] for r in rows], dtype=torch.float32, device=device),
            torch.tensor([v.valid for v in verdicts], dtype=torch.bool, device=device),
            {p: c.float() for p, c in columns.items()},
            tuple(v.note for v in verdicts),
            self.identity,
        )

    def regions(self, media: Media, prompts: Sequence[str]) -> Regions:
        """Every object seen, with its box, and the picture as a whole; scores in [-1, 1].

        An object that the prompt does not ask for, or not so often, is wrong. What is missing has
        no box: it counts against the whole, as wrong positions do.

        Raises:
            ValueError: a call that could never work, as in :meth:`score`.
        """
        checked_call(self.info, media, prompts, None)
        views = _views(_pixels(media))
        verdicts = [_verdict(v, p) for v, p in zip(views, prompts, strict=True)]
        rows = zip(views, prompts, verdicts, strict=True)
        device = media.data.device
        return Regions(
            tuple(self._located(v.detections, parse(p)) if d.valid else () for v, p, d in rows),
            torch.tensor([2 * self._read(d)[0] - 1 for d in verdicts], device=device),
            torch.tensor([d.valid for d in verdicts], dtype=torch.bool, device=device),
            tuple(d.note for d in verdicts),
        )

    def _located(self, found: Sequence[Detection], spec: PromptSpec) -> tuple[Region, ...]:
        pairs = _best(found, spec).pairs if found else []
        credits = {id(d): self._credit(wanted, d) for wanted, d in pairs if d is not None}
        return tuple(Region(d.box, 2 * credits.get(id(d), 0.0) - 1, _name(d)) for d in found)

    def _read(self, verdict: Verdict) -> tuple[float, Mapping[str, float]]:
        raise NotImplementedError

    def _credit(self, wanted: ObjectSpec, d: Detection) -> float:
        """How far an object is the wanted one, in [0, 1]."""
        raise NotImplementedError


class ShapesStrict(_ShapesReward):
    """1 where the picture shows exactly what the prompt asks for, else 0."""

    info = info_of("shapes_strict")

    def _read(self, verdict: Verdict) -> tuple[float, Mapping[str, float]]:
        return (float(verdict.strict) if verdict.valid else math.nan), verdict.parts

    def _credit(self, wanted: ObjectSpec, d: Detection) -> float:
        return float(_fits(wanted, d))


class ShapesPartial(_ShapesReward):
    """Graded credit in [0, 1]: at least 0.9 exactly where :class:`ShapesStrict` says 1."""

    info = info_of("shapes_partial")

    def _read(self, verdict: Verdict) -> tuple[float, Mapping[str, float]]:
        return verdict.partial, verdict.graded

    def _credit(self, wanted: ObjectSpec, d: Detection) -> float:
        return _object_credit(wanted, d)[2]


def _pixels(media: Media) -> np.ndarray:
    """``(B, H, W, 3)``; grey pictures are repeated, values that are not finite are kept."""
    data = media.data.detach().float().cpu()
    return data.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _settings_digest() -> str:
    names = ("CHROMA", "MIN_AREA", "MIN_IOU", "MAX_COLOR_DISTANCE", "MIN_UNIFORM", "GRID")
    settings = [getattr(shapes_vision, n) for n in (*names, "MAX_SIDE")]
    text = repr([*settings, RELATION_MARGIN, SHAPES, COLORS])
    return hashlib.sha256(text.encode()).hexdigest()[:10]
