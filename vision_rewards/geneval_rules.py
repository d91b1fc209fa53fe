"""GenEval's rules (Ghosh et al., 2310.11513) on detected objects; no network, no picture.

A requirement lists what has to be there (``include``: class, count, colour, position relative to an
earlier entry) and what must not (``exclude``: class and the count from which it is wrong).  Three
readings of the same rules:

* ``official``: the published benchmark. At least the asked number, judged on the most confident
  ones; ``exclude`` is what makes counting exact.
* ``strict``: exactly the asked number, every one of them judged.
* ``partial``: graded, for training: the mean of one term for each count, colour and position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmalign.registry import unknown

COLORS = tuple("red orange yellow green blue purple pink brown black white".split())
RELATIONS = ("left of", "right of", "above", "below")
POSITION_SHRINK = 0.1  # of both sizes: how far boxes have to be apart to stand in a relation
POSITION_COSINE = 0.5  # share of the distance that has to lie along an axis
TOUCHING = 1e-3  # pixels


@dataclass(frozen=True)
class Detection:
    """One object found: box ``(x0, y0, x1, y1)`` in pixels, confidence, mask ``(H, W)`` bool."""

    box: tuple[float, float, float, float]
    score: float
    mask: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Clause:
    """``count`` objects of a class, of a colour, in a relation to those of clause ``target``."""

    name: str
    count: int = 1
    color: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Requirement:
    """What a picture has to show; ``tag`` is the GenEval task."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    tag: str = ""

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class that is asked about, once."""
        return tuple(dict.fromkeys(c.name for c in (*self.include, *self.exclude)))

    @staticmethod
    def of(metadata: Mapping[str, Any]) -> Requirement:
        """From one line of GenEval's ``evaluation_metadata.jsonl``.

        Raises:
            ValueError: a clause without a class, an unusable count, an unknown colour or relation,
                or a position relative to a clause that does not come before.
        """
        include = tuple(_clause(c, k) for k, c in enumerate(metadata.get("include", ())))
        exclude = tuple(_clause(c, 0) for c in metadata.get("exclude", ()))
        if not include and not exclude:
            raise ValueError("a GenEval requirement needs 'include' or 'exclude'")
        return Requirement(include, exclude, str(metadata.get("tag", "")))


CLAUSE_KEYS = ("class", "count", "color", "position")


def _clause(given: Mapping[str, Any], index: int) -> Clause:
    for key in given:  # a misspelt one would drop a requirement without a word
        if key not in CLAUSE_KEYS:
            raise unknown("key of a GenEval clause", str(key), CLAUSE_KEYS)
    name, count, color = given.get("class"), given.get("count", 1), given.get("color")
    if not isinstance(name, str) or not name:
        raise ValueError(f"clause {dict(given)} of a GenEval requirement names no class")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(
            f"clause {dict(given)}: count must be a whole number from 1, got {count!r}"
        )
    if color is not None and color not in COLORS:
        raise unknown("GenEval colour", str(color), COLORS)
    if given.get("position") is None:
        return Clause(name, count, color)
    relation, target = given["position"]
    if relation not in RELATIONS:
        raise unknown("GenEval relation", str(relation), RELATIONS)
    if not 0 <= target < index:
        raise ValueError(
            f"clause {dict(given)}: position refers to clause {target}, not an earlier"
        )
    return Clause(name, count, color, relation, int(target))


Objects = Mapping[str, Sequence[Detection]]  # most confident first
ColorOf = Callable[[str, Sequence[Detection]], Sequence[str]]  # class, objects -> their colours


def relations(
    a: Sequence[float], b: Sequence[float], shrink: float = POSITION_SHRINK
) -> frozenset[str]:
    """How box ``a`` stands to box ``b``: none, one or two of :data:`RELATIONS`.

    The offset of the centres is shortened on each axis by ``shrink`` times both sizes; a relation
    holds where what is left is more than half of the full distance. y points down.
    """
    offset, left = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (a[low] + a[high]) / 2 - (b[low] + b[high]) / 2
        sizes = abs(a[high] - a[low]) + abs(b[high] - b[low])
        offset.append(distance)
        left.append(math.copysign(max(abs(distance) - shrink * sizes, 0.0), distance))
    if max(map(abs, left)) < TOUCHING:
        return frozenset()
    x, y = (part / math.hypot(*offset) for part in left)
    holds = (x < -POSITION_COSINE, x > POSITION_COSINE, y < -POSITION_COSINE, y > POSITION_COSINE)
    return frozenset(r for r, h in zip(RELATIONS, holds, strict=True) if h)


@dataclass(frozen=True)
class Judgement:
    """Whether a picture passes, and why not; one line for each reason."""

    passed: bool
    reasons: tuple[str, ...] = ()


def judge(
    objects: Objects, wanted: Requirement, color_of: ColorOf, *, exact: bool = False
) -> Judgement:
    """The ``official`` rules, or with ``exact`` the ``strict`` ones.

    Args:
        objects: detections by class, most confident first, already filtered by confidence.
        wanted: what has to be there.
        color_of: classifies the colours of objects of a class; asked only where it matters.
        exact: the number found must equal the number asked for, and all of them are judged.
    """
    groups: list[Sequence[Detection] | None] = []
    reasons: list[str] = []
    for clause in wanted.include:
        found = objects.get(clause.name, ())
        chosen = found if exact else found[: clause.count]
        reason = _count(clause, len(chosen), exact) or _color(clause, chosen, color_of, exact)
        if not reason and clause.relation:
            reason = _position(clause, chosen, groups[clause.target])
        groups.append(None if reason else chosen)
        reasons += [reason] if reason else []
    for clause in wanted.exclude:
        number = len(objects.get(clause.name, ()))
        if number >= clause.count:
            reasons.append(f"expected {clause.name}<{clause.count}, found {number}")
    return Judgement(not reasons, tuple(reasons))


def _count(clause: Clause, found: int, exact: bool) -> str:
    if found == clause.count:
        return ""
    return f"expected {clause.name}{'==' if exact else '>='}{clause.count}, found {found}"


def _color(clause: Clause, chosen: Sequence[Detection], color_of: ColorOf, exact: bool) -> str:
    if clause.color is None:
        return ""
    colors = list(color_of(clause.name, chosen))
    if colors.count(clause.color) == clause.count:
        return ""
    said = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
    sign = "==" if exact else ">="
    return f"expected {clause.color} {clause.name}{sign}{clause.count}, found {said}"


def _position(
    clause: Clause, chosen: Sequence[Detection], targets: Sequence[Detection] | None
) -> str:
    """Every object must stand in the relation to every target."""
    if targets is None:
        return f"no target for {clause.name} to be {clause.relation}"
    for a in chosen:
        for b in targets:
            found = relations(a.box, b.box)
            if clause.relation not in found:
                said = " and ".join(r for r in RELATIONS if r in found) or "in no relation to"
                return f"expected {clause.name} {clause.relation} target, found {said} target"
    return ""


def partial(
    objects: Objects,
    wanted: Requirement,
    color_of: ColorOf,
    *,
    floor: float | None = 0.0,
    compat: str = "",
) -> float:
    """Graded credit: the mean of the terms of all ``include`` clauses.

    A clause gives ``1 - |want - found| / want`` for its count.  Where the count is right, a colour
    gives ``1 - |want - right colour| / want`` and a position 0 or 1; where it is wrong, each of
    the two that is asked for gives 0.

    Args:
        objects: detections by class, most confident first, already filtered by confidence.
        wanted: what has to be there; ``exclude`` takes no part.
        color_of: classifies the colours of objects of a class; asked only where it matters.
        floor: lowest value of a term; ``None`` lets many superfluous objects go below 0.
        compat: ``"port"`` grades as a widely used port of Flow-GRPO's reward server does: a wrong
            count gives one 0 for colour and position together, a wrong colour drops the position
            term, and a failed position gives 0 *and then* 1, so that it earns half.

    Raises:
        UnknownNameError: another ``compat``.
        ValueError: nothing to grade, because ``include`` is empty.
    """
    if compat not in ("", "port"):
        raise unknown("compat", compat, ("", "port"))
    if not wanted.include:
        raise ValueError("partial credit needs at least one 'include' clause")
    groups: list[Sequence[Detection] | None] = []
    terms: list[float] = []
    for clause in wanted.include:
        found = objects.get(clause.name, ())
        target = groups[clause.target] if clause.relation else None
        grade = _port_terms if compat else _clause_terms
        got, matched = grade(clause, found, target, color_of)
        terms += got
        groups.append(found if matched else None)
    if floor is not None:
        terms = [max(floor, t) for t in terms]
    return sum(terms) / len(terms)


Terms = tuple[list[float], bool]  # terms of one clause, and whether later clauses may refer to it


def _share(want: int, found: int) -> float:
    return 1.0 - abs(want - found) / want


def _right_colors(clause: Clause, found: Sequence[Detection], color_of: ColorOf) -> int:
    return list(color_of(clause.name, found)).count(clause.color or "")


def _clause_terms(
    clause: Clause,
    found: Sequence[Detection],
    target: Sequence[Detection] | None,
    color_of: ColorOf,
) -> Terms:
    terms = [_share(clause.count, len(found))]
    counted = len(found) == clause.count
    if clause.color:
        right = _right_colors(clause, found, color_of) if counted else 0
        terms.append(_share(clause.count, right) if counted else 0.0)
    matched = all(t == 1.0 for t in terms)
    if clause.relation:
        terms.append(float(counted and not _position(clause, found, target)))
    return terms, matched and terms[-1] == 1.0


def _port_terms(
    clause: Clause,
    found: Sequence[Detection],
    target: Sequence[Detection] | None,
    color_of: ColorOf,
) -> Terms:
    terms = [_share(clause.count, len(found))]
    if len(found) != clause.count:
        return terms + [0.0] * bool(clause.color or clause.relation), False
    matched = True
    if clause.color:
        terms.append(_share(clause.count, _right_colors(clause, found, color_of)))
        matched = terms[-1] == 1.0
    if clause.relation and matched:
        matched = not _position(clause, found, target)
        terms += [1.0] if matched else [0.0] if target is None else [0.0, 1.0]
    return terms, matched
