"""How good a reward model is on held-out judgements, with intervals.

Judgements about one prompt are not independent, so beside Wilson's interval, which takes them
for independent, there is one from resampling whole groups (prompts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Groups = Sequence[str] | None  # the group of each row; None asks for no resampling
Z95 = 1.959963984540054
REPLICATES = 1000


def wilson(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); NaN without data."""
    if not n:
        return math.nan, math.nan
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def cluster_bootstrap(
    statistic: Callable[[Array], float], groups: Groups, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval from drawing whole groups with replacement.

    Args:
        statistic: of an array of row numbers. groups: the group of each row.

    Returns:
        NaN twice without groups, or with fewer than two.
    """
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups or ()):
        rows.setdefault(group, []).append(row)
    if len(rows) < 2:
        return math.nan, math.nan
    members = [np.array(r) for r in rows.values()]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(REPLICATES):
        drawn = rng.integers(0, len(members), len(members))
        values.append(statistic(np.concatenate([members[i] for i in drawn])))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def proportion(correct: Array, groups: Groups) -> dict[str, Any]:
    """A share with both intervals; ``correct`` holds values in [0, 1] (a half for a tie)."""
    n = len(correct)
    interval = cluster_bootstrap(lambda rows: float(correct[rows].mean()), groups)
    return {
        "value": float(correct.mean()) if n else math.nan,
        "n": n,
        "wilson": list(wilson(float(correct.sum()), n)),
        "bootstrap": list(interval),
    }


def pair_correct(d: Array, target: Array) -> Array:
    """1 where the sign of the score difference is that of the target, 0.5 where it is zero."""
    return np.where(d == 0, 0.5, (np.sign(d) == np.sign(target)).astype(float))


def auroc(score: Array, positive: Array) -> float:
    """Area under the ROC curve, ties counting half; NaN where a class is missing."""
    from scipy.stats import rankdata

    n1 = int(positive.sum())
    n0 = len(positive) - n1
    if not n1 or not n0:
        return math.nan
    ranks = rankdata(score)
    return float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def spearman(a: Array, b: Array) -> tuple[float, float, float]:
    """Rank correlation with the 95 % interval of Bonett & Wright (2000)."""
    from scipy.stats import spearmanr

    n = len(a)
    if n < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan, math.nan, math.nan
    r = float(spearmanr(a, b).statistic)
    half = Z95 * math.sqrt((1 + r * r / 2) / (n - 3))
    z = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
    return r, math.tanh(z - half), math.tanh(z + half)


def reliability(
    probability: Array, outcome: Array, bins: int = 10, low: float = 0.0
) -> dict[str, Any]:
    """Calibration curve and expected calibration error.

    Equal bins over [``low``, 1]; ``ece = sum_b n_b / N |mean outcome - mean probability|`` (Naeini
    et al. 2015, Guo et al. 2017). For pairs the probability is that of the predicted winner, so
    ``low`` is 0.5.

    Returns:
        ``ece``, ``brier`` and ``bins``, each with its ends, count, mean probability and outcome.
    """
    edges = np.linspace(low, 1.0, bins + 1)
    place = np.clip(np.digitize(probability, edges[1:-1]), 0, bins - 1)
    rows, error = [], 0.0
    for b in range(bins):
        here = place == b
        count = int(here.sum())
        row: dict[str, Any] = {"low": float(edges[b]), "high": float(edges[b + 1]), "n": count}
        if count:
            row["predicted"] = float(probability[here].mean())
            row["observed"] = float(outcome[here].mean())
            error += count / len(probability) * abs(row["observed"] - row["predicted"])
        rows.append(row)
    brier = float(((probability - outcome) ** 2).mean()) if len(probability) else math.nan
    return {"ece": error if len(probability) else math.nan, "brier": brier, "bins": rows}
