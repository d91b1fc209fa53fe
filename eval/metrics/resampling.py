"""Intervals of any statistic by resampling prompts, and a paired test without a normal law.

Means have their own intervals in :mod:`eval.statistics`; these are for statistics that are no
means (rank correlations, calibrated accuracies), with the same rules: prompts are drawn, ``n - 1``
of ``n``, and single rows where there are fewer than ten prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from scipy import stats

from eval.metrics.pairs import Array, Values
from eval.statistics import MIN_CLUSTERS, Interval, Unit

Statistic = Callable[[Array], float]
SAMPLES = 1000
MOST_UNDEFINED = 0.05  # share of replicates without a value beyond which there is no interval


def bootstrap_statistic(
    statistic: Statistic,
    clusters: Sequence[Hashable],
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """A statistic of rows with its percentile interval, clustered.

    Args:
        statistic: of an array of row numbers, in which rows may repeat.
        clusters: the prompt of each row.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, cluster in enumerate(clusters):
        rows.setdefault(cluster, []).append(row)
    count, distinct = len(clusters), len(rows)
    value = float(statistic(np.arange(count))) if count else math.nan
    unit: Unit = "prompt" if distinct >= MIN_CLUSTERS else "sample"
    if unit == "sample":
        rows = {row: [row] for row in range(count)}
    if len(rows) < 3 or math.isnan(value):
        return Interval(value, math.nan, math.nan, count, distinct, "none", level)
    drawn = np.random.default_rng(seed).integers(len(rows), size=(samples, len(rows) - 1))
    members = list(rows.values())
    found = np.array([statistic(picked) for picked in _members(members, drawn)])
    if np.isnan(found).mean() > MOST_UNDEFINED:
        return Interval(value, math.nan, math.nan, count, distinct, "none", level)
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    ends = min(float(low), value), max(float(high), value)
    return Interval(value, *ends, count, distinct, unit, level)


def _members(members: Sequence[Sequence[int]], drawn: Array) -> Iterator[Array]:
    """The rows of the clusters of each draw, one after the other."""
    rows = np.concatenate([np.asarray(m) for m in members])
    sizes = np.array([len(m) for m in members])
    starts = np.concatenate([[0], sizes.cumsum()[:-1]])
    for draw in drawn:
        own = sizes[draw]
        before = np.concatenate([[0], own.cumsum()[:-1]])  # rows of the clusters drawn earlier
        yield rows[np.repeat(starts[draw] - before, own) + np.arange(own.sum())]


def paired_permutation_test(
    first: Values, second: Values, clusters: Sequence[Hashable], samples: int = 9999, seed: int = 0
) -> float:
    """Two-sided p-value of "both are equally good" for values of the same items.

    Under it, swapping the two values of all items of a prompt changes nothing. All swaps are tried
    where there are at most ``samples`` of them, else as many random ones. 1 where nothing differs.
    """
    codes = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    places = [codes[c] for c in clusters]
    a = np.bincount(places, np.asarray(first, float), len(codes))
    b = np.bincount(places, np.asarray(second, float), len(codes))
    if len(codes) < 2 or np.array_equal(a, b):
        return 1.0
    found = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=samples,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
