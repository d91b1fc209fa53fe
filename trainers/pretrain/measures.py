"""How well a score separates or orders: AUROC and rank correlation with 95 % intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measured:
    """A number with its 95 % interval and what it was taken over."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] over {self.count}"


def auroc(scores: np.ndarray, positive: np.ndarray) -> Measured:
    """Probability that a positive scores above a negative; ties count half.

    The interval is Hanley and McNeil's (1982).

    Raises:
        ValueError: one of the classes is empty.
    """
    from scipy.stats import rankdata

    positive = np.asarray(positive, bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        raise ValueError(f"AUROC needs both classes, got {n} positive and {m} negative samples")
    ranks = rankdata(scores)
    area = float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (n - 1) * (first - area**2) + (m - 1) * (second - area**2)
    half = 1.96 * math.sqrt(max(spread, 0.0) / (n * m))
    return Measured(area, max(0.0, area - half), min(1.0, area + half), n + m)


def spearman(a: np.ndarray, b: np.ndarray) -> Measured:
    """Rank correlation; the interval is Fisher's, with the variance of Bonett and Wright (2000)."""
    from scipy.stats import spearmanr

    value, count = float(spearmanr(a, b).statistic), len(a)
    half = 1.96 * math.sqrt((1 + value**2 / 2) / max(count - 3, 1))
    at = math.atanh(min(max(value, -0.999999), 0.999999))
    return Measured(value, math.tanh(at - half), math.tanh(at + half), count)


def proportion(hits: np.ndarray) -> Measured:
    """Share of hits with Wilson's interval."""
    n, z = len(hits), 1.96
    p = float(np.mean(hits))
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Measured(p, (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n), n)
