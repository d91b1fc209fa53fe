"""How far annotators agree: with each other, with themselves, and with the toss of a coin.

Judgements are ordered, a - tie - b.  With ``n_uc`` of the ``m_u >= 2`` judgements of unit ``u`` in
category ``c``, Krippendorff's coincidences are

    o_ck = sum_u n_uc (n_uk - [c = k]) / (m_u - 1),    n_c = sum_k o_ck,    n = sum_c n_c,

and ``alpha = 1 - (n - 1) sum_{c<k} o_ck d_ck / sum_{c<k} n_c n_k d_ck`` with ``d_ck = 1`` (nominal)
or ``(n_c / 2 + n_{c+1} + ... + n_{k-1} + n_k / 2)^2`` (ordinal).  Cohen's kappa of two annotators
is ``1 - sum w_ck p_ck / sum w_ck p_c. p_.k`` with ``w_ck = |c - k| / (K - 1)``: a against b weighs
twice what a tie against either does.

Source: Krippendorff, Content Analysis (2004), chapter 11; Cohen, Psychol. Bull. 70 (1968) 213.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from vision_rewards.labelling.decisions import UNDO, Row, last_lines, pair_key
from vision_rewards.training.metrics import Array, cluster_bootstrap, wilson

CATEGORIES = ("a", "tie", "b")


@dataclass(frozen=True)
class Judgement:
    """Who said what about a pair: ``value`` is a category, counted from the first line's side a."""

    pair: str
    prompt: str
    user: str
    round: int
    value: int


def judgements(rows: Iterable[Row]) -> list[Judgement]:
    """The lines that say a, b or tie; in others, where a and b are exchanged, so is the label."""
    first: dict[str, str] = {}
    found = []
    for row in rows:
        if row.get("label") not in CATEGORIES:
            continue
        key = pair_key(row["prompt"], row["image_a"], row["image_b"])
        value = CATEGORIES.index(row["label"])
        if first.setdefault(key, row["image_a"]) != row["image_a"]:
            value = 2 - value
        user, turn = str(row.get("user", "")), int(row.get("round", 0))
        found.append(Judgement(key, row["prompt"], user, turn, value))
    return found


def coincidences(units: Sequence[Sequence[int]], size: int) -> Array:
    """Coincidences ``(U, size, size)`` of each unit; zero where fewer than two judged it."""
    found = np.zeros((len(units), size, size))
    for u, values in enumerate(units):
        if len(values) > 1:
            count = np.bincount(values, minlength=size).astype(float)
            found[u] = (np.outer(count, count) - np.diag(count)) / (len(values) - 1)
    return found


def alpha(coincidence: Array, ordinal: bool = True) -> float:
    """Krippendorff's alpha of summed coincidences ``(K, K)``; NaN where nothing varies."""
    each = coincidence.sum(0)
    upto = np.cumsum(each) - each / 2  # half of itself, all below
    distance = (upto[:, None] - upto[None]) ** 2 if ordinal else 1.0 - np.eye(len(each))
    expected = float((np.outer(each, each) * distance).sum())
    if not expected:
        return math.nan
    return 1.0 - (float(each.sum()) - 1.0) * float((coincidence * distance).sum()) / expected


def kappa(a: Sequence[int], b: Sequence[int], size: int = len(CATEGORIES)) -> float:
    """Cohen's kappa with linear weights; NaN where both always say one and the same."""
    table = np.zeros((size, size))
    np.add.at(table, (np.asarray(a), np.asarray(b)), 1.0 / max(len(a), 1))
    place = np.arange(size)
    weight = np.abs(place[:, None] - place[None]) / (size - 1)
    expected = float((weight * np.outer(table.sum(1), table.sum(0))).sum())
    return 1.0 - float((weight * table).sum()) / expected if expected else math.nan


def agreement(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything the page of agreement shows, as plain JSON; what is unknown is ``None``.

    Args:
        rows: the lines of a file of labels, replaced ones included.
    """
    rows_standing = [row for _, row in last_lines(rows)]
    said = judgements(rows_standing)
    first = [j for j in said if j.round == 0]
    users = sorted({str(r.get("user", "")) for r in rows})
    report = {
        "lines": len(rows),
        "judgements": len(said),
        "pairs": len({j.pair for j in said}),
        "between": _between(first),
        "two": _by_two(first),
        "annotators": [_annotator(user, rows, rows_standing, said) for user in users],
    }
    plain: dict[str, Any] = _nulls(report)
    return plain


def _between(first: Sequence[Judgement]) -> dict[str, Any]:
    """Agreement of different people about one pair, with intervals from resampling prompts."""
    units: dict[str, list[int]] = {}
    prompts: dict[str, str] = {}
    for j in first:
        units.setdefault(j.pair, []).append(j.value)
        prompts[j.pair] = j.prompt
    shared = {pair: values for pair, values in units.items() if len(values) > 1}
    if not shared:
        return {"pairs": 0}
    groups = [prompts[pair] for pair in shared]
    found = coincidences(list(shared.values()), len(CATEGORIES))
    # Of a unit's ordered couples, m (m - 1) in all, those in one category.
    same = np.trace(found, axis1=1, axis2=2) / found.sum((1, 2))

    def measure(ordinal: bool) -> dict[str, Any]:
        interval = cluster_bootstrap(lambda r: alpha(found[r].sum(0), ordinal), groups)
        return {"value": alpha(found.sum(0), ordinal), "interval": list(interval)}

    raw = list(cluster_bootstrap(lambda r: float(same[r].mean()), groups))
    ends = found.sum(0)[np.ix_([0, 2], [0, 2])]  # where neither said tie
    return {
        "pairs": len(shared),
        "raw": {"value": float(same.mean()), "interval": raw},
        "without_ties": float(np.trace(ends) / ends.sum()) if ends.sum() else math.nan,
        "alpha_ordinal": measure(True),
        "alpha_nominal": measure(False),
    }


def _by_two(first: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Raw agreement and kappa of each two annotators who share a pair."""
    by_user: dict[str, dict[str, int]] = {}
    for j in first:
        by_user.setdefault(j.user, {})[j.pair] = j.value
    found = []
    for x, y in combinations(sorted(by_user), 2):
        shared = sorted(by_user[x].keys() & by_user[y].keys())
        if shared:
            a, b = ([by_user[u][p] for p in shared] for u in (x, y))
            same = sum(v == w for v, w in zip(a, b, strict=True))
            found.append({"users": [x, y], "raw": _share(same, len(shared)), "kappa": kappa(a, b)})
    return found


def _annotator(
    user: str, rows: Sequence[Row], stand: Sequence[Row], said: Sequence[Judgement]
) -> dict[str, Any]:
    mine = [r for r in stand if str(r.get("user", "")) == user]
    labels = Counter(r.get("label") for r in mine)
    sides = [r["shown"][0] == r["label"] for r in mine if r.get("label") in ("a", "b")
             and "shown" in r]  # fmt: skip
    seconds = [r["seconds"] for r in mine if r.get("seconds") is not None and _judged(r)]
    judged = sum(map(_judged, mine))
    undone = sum(str(r.get("user", "")) == user and r.get("label") == UNDO for r in rows)
    return {
        "user": user,
        "judgements": judged,
        "ties": _share(labels["tie"], judged),
        "skips": labels["skip"],
        "undone": undone,
        "left": _share(sum(sides), len(sides)),
        "self": _self([j for j in said if j.user == user]),
        "seconds": statistics.median(seconds) if seconds else math.nan,
    }


def _judged(row: Row) -> bool:
    return row.get("label") in CATEGORIES


def _self(mine: Sequence[Judgement]) -> dict[str, Any]:
    """How often somebody said the same when a pair was shown again."""
    rounds: dict[str, dict[int, int]] = {}
    for j in mine:
        rounds.setdefault(j.pair, {})[j.round] = j.value
    both = [(r[0], r[1]) for r in rounds.values() if {0, 1} <= r.keys()]
    return _share(sum(a == b for a, b in both), len(both))


def _share(count: int, n: int) -> dict[str, Any]:
    """A share with Wilson's interval."""
    return {"value": count / n if n else math.nan, "n": n, "interval": list(wilson(count, n))}


def _nulls(value: Any) -> Any:
    """NaN is not JSON."""
    if isinstance(value, Mapping):
        return {k: _nulls(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nulls(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
