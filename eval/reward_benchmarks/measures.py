"""From judged items to numbers with intervals. Items that were not scored take no part."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from eval.metrics.agreement import calibration, position_bias, swap_consistency
from eval.metrics.correlation import krcc, plcc, srcc
from eval.metrics.pairs import (
    Mode,
    Ties,
    acc_plus,
    accuracy_with_ties,
    half_credit_points,
    inversion_score,
    ranked_pairs,
    strict_points,
)
from eval.metrics.resampling import bootstrap_statistic
from eval.metrics.selection import best_of_n, vote_of, vote_point
from eval.reward_benchmarks.items import Judged
from eval.statistics import Interval, bootstrap_mean, bootstrap_task_mean

Points = Callable[[Judged], Sequence[float]]


@dataclass(frozen=True)
class Measure:
    """One number of a benchmark.

    Attributes:
        name: as in tables.
        meaning: one line.
        compute: of scored items, to the number with its interval.
        points: the values that it is the mean of, item by item; ``None`` where it is no mean. Two
            rewards are compared on them.
        chance: its value for a reward that guesses, where there is one.
        of: the dimension it looks at; empty for all.
        share: whether it is a share, printed in per cent.
        everything: whether items without a score count too (as its points then say).
    """

    name: str
    meaning: str
    compute: Callable[[Sequence[Judged]], Interval]
    points: Points | None = None
    chance: float | None = None
    of: str = ""
    share: bool = True
    everything: bool = False

    def __call__(self, judged: Sequence[Judged]) -> Interval:
        """The number over its items."""
        return self.compute(self.among(judged))

    def among(self, judged: Sequence[Judged]) -> list[Judged]:
        """The items it looks at: of its dimension, and scored."""
        scored = [j for j in judged if j.scored or self.everything]
        return [j for j in scored if self.of in ("", j.item.dimension)]


# --- points of one item -----------------------------------------------------------------------


def strict(judged: Judged) -> Sequence[float]:
    """Every pair that people ordered: 1 where the scores say the same, a tie is wrong."""
    return _ordered(judged, strict_points)


def half_credit(judged: Judged) -> Sequence[float]:
    """Every pair that people ordered: 1, or 1/2 where the scores are equal."""
    return _ordered(judged, half_credit_points)


def _ordered(judged: Judged, points: Callable[..., np.ndarray]) -> Sequence[float]:
    if judged.item.form == "best":  # a choice, counted as one
        return []
    labels, differences = ranked_pairs(judged.item.truth, judged.scores)
    return list(map(float, points(labels, differences)))


def inversions(ties: Ties) -> Points:
    """HPDv2's agreement of a ranking."""
    return lambda judged: [inversion_score(judged.item.truth, judged.scores, ties)]


def best(judged: Judged) -> Sequence[float]:
    """Quality of the candidate that would be chosen."""
    return [best_of_n(judged.scores, judged.item.truth)]


def votes(judged: Judged) -> Sequence[float]:
    """TIGER GenAI-Bench: the vote is right, a plain tie for either kind of tie.

    No vote is wrong, as in the official script.
    """
    if not judged.scored:
        return [0.0]
    a, b = judged.item.truth
    human = "A>B" if a > b else "B>A" if b > a else "A=B=Good" if a > 0 else "A=B=Bad"
    return [vote_point(human, vote_of(judged.difference))]  # type: ignore[arg-type]


# --- numbers over items -----------------------------------------------------------------------


def mean_of(points: Points) -> Callable[[Sequence[Judged]], Interval]:
    """Mean over all points, prompts resampled."""

    def compute(judged: Sequence[Judged]) -> Interval:
        return bootstrap_mean(*_flat(judged, points))

    return compute


def macro_of(
    points: Points, group: Callable[[Judged], str] = lambda j: j.item.category
) -> Callable[[Sequence[Judged]], Interval]:
    """Unweighted mean over categories (or other groups) of their means."""

    def compute(judged: Sequence[Judged]) -> Interval:
        groups: dict[str, list[Judged]] = {}
        for j in judged:
            groups.setdefault(group(j), []).append(j)
        found = {name: _flat(own, points) for name, own in groups.items()}
        return bootstrap_task_mean({name: f for name, f in found.items() if f[0]})

    return compute


def statistic_of(
    arrays: Callable[[Sequence[Judged]], Sequence[np.ndarray]], statistic: Callable[..., float]
) -> Callable[[Sequence[Judged]], Interval]:
    """Any number of a set of items, items resampled by prompt.

    Args:
        arrays: what it is computed from, one element an item each.
        statistic: of (rows of) these arrays.
    """

    def compute(judged: Sequence[Judged]) -> Interval:
        found = arrays(judged)

        def of(rows: np.ndarray) -> float:
            return statistic(*(a[rows] for a in found))

        return bootstrap_statistic(of, [j.item.unit for j in judged], samples=400)

    return compute


def with_ties(mode: Mode) -> Callable[[Sequence[Judged]], Interval]:
    """Pair accuracy at the tie threshold that is best on these pairs."""
    return statistic_of(labels_and_differences, partial(accuracy_with_ties, mode=mode))


def labels_and_differences(judged: Sequence[Judged]) -> list[np.ndarray]:
    """Whom people prefer in each pair, and the difference of the scores."""
    human = np.array([j.item.human for j in judged], float)
    return [human, np.array([j.difference for j in judged])]


CORRELATIONS: dict[str, Callable[..., float]] = {
    "SRCC": srcc,
    "PLCC": plcc,
    "PLCC, fitted": partial(plcc, fit=True),
    "KRCC": krcc,
}


def correlation(kind: str) -> Callable[[Sequence[Judged]], Interval]:
    """One of :data:`CORRELATIONS`, of scores with ratings."""

    def arrays(judged: Sequence[Judged]) -> list[np.ndarray]:
        return [np.array([j.scores[0] for j in judged]),
                np.array([j.item.truth[0] for j in judged])]  # fmt: skip

    return statistic_of(arrays, CORRELATIONS[kind])


def all_pairs_right(judged: Sequence[Judged]) -> Interval:
    """ACC+: share of questions all of whose pairs are right, questions resampled.

    A question of which one pair was not scored is left out: the others do not answer it.
    """
    questions: dict[Hashable, list[Judged]] = {}
    for j in judged:
        questions.setdefault(j.item.question or j.item.key, []).append(j)
    whole = [own for own in questions.values() if all(j.scored for j in own)]
    points = [[p for j in own for p in strict(j)] for own in whole]
    return bootstrap_mean([acc_plus(own, [0] * len(own)) for own in points if own])


def consistency(judged: Sequence[Judged]) -> Interval:
    """Share of comparisons with the same verdict in both orders."""
    pairs = [(swap_consistency([a], [b]), j.item.unit) for j in judged for a, b in j.orders]
    return bootstrap_mean([p for p, _ in pairs], [u for _, u in pairs])


def bias(judged: Sequence[Judged]) -> Interval:
    """How far being shown first raises the preference above one half."""
    pairs = [(a, b, j.item.unit) for j in judged for a, b in j.orders]

    def of(rows: np.ndarray) -> float:
        return position_bias([pairs[i][0] for i in rows], [pairs[i][1] for i in rows])

    return bootstrap_statistic(of, [unit for _, _, unit in pairs])


def calibration_error(judged: Sequence[Judged]) -> Interval:
    """Expected calibration error of preferences over pairs that people ordered."""
    own = [j for j in judged if j.item.form == "pair" and j.item.human and j.orders]

    def arrays(some: Sequence[Judged]) -> list[np.ndarray]:
        won = np.array([float(j.item.human > 0) for j in some])
        return [np.array([j.scores[0] for j in some]), won]

    return statistic_of(arrays, lambda p, won: calibration(p, won)["ece"])(own)


def _flat(judged: Sequence[Judged], points: Points) -> tuple[list[float], list[str]]:
    found = [(p, j.item.unit) for j in judged for p in points(j)]
    return [p for p, _ in found], [u for _, u in found]


# --- what several benchmarks share ------------------------------------------------------------


def pair_measures(of: str = "", prefix: str = "") -> list[Measure]:
    """Strict and half-credit accuracy over pairs that people ordered."""
    return [
        Measure(f"{prefix}accuracy", "pairs that people ordered; a predicted tie is wrong",
                mean_of(strict), strict, 0.5, of),
        Measure(f"{prefix}accuracy, ties half", "the same; a predicted tie counts one half",
                mean_of(half_credit), half_credit, 0.5, of),
    ]  # fmt: skip


def comparison_measures() -> list[Measure]:
    """What only rewards that compare have: empty for others."""
    return [
        Measure("same verdict in both orders", "1 is ideal", consistency),
        Measure("position bias", "preference for the one shown first, above 1/2; 0 is ideal",
                bias, chance=0.0, share=False),
        Measure("calibration error", "of the preference as a probability; 0 is ideal",
                calibration_error, share=False),
    ]  # fmt: skip
