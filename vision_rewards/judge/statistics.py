"""Intervals for the few numbers of a robustness report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A mean or share with its 95 % interval and the number of values; NaN where there is none."""

    value: float
    low: float
    high: float
    n: int


def share(hits: Sequence[bool]) -> Estimate:
    """Share of true values, with the Wilson score interval (it is sound for 0 and 1)."""
    n = len(hits)
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    p, z2 = sum(hits) / n, _Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def mean(values: Sequence[float]) -> Estimate:
    """Mean, with Student's t interval; without an interval for fewer than two values."""
    from scipy.stats import t

    n = len(values)
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    centre = sum(values) / n
    if n == 1:
        return Estimate(centre, math.nan, math.nan, 1)
    deviation = math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Estimate(centre, centre - half, centre + half, n)
