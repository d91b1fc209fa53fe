"""How well scores follow ratings: rank and linear correlations, NaN where one side is constant."""

from __future__ import annotations

import math
import warnings

import numpy as np
from scipy import optimize, stats

from eval.metrics.pairs import Array, Values

FEWEST = 3  # pairs of values below which a correlation says nothing
FEWEST_FOR_FIT = 5  # one more than the logistic curve has parameters


def srcc(scores: Values, ratings: Values) -> float:
    """Spearman's rank correlation."""
    x, y = _arrays(scores, ratings)
    return float(stats.spearmanr(x, y).statistic) if _varied(x, y) else math.nan


def krcc(scores: Values, ratings: Values) -> float:
    """Kendall's rank correlation tau-b, which allows for ties."""
    x, y = _arrays(scores, ratings)
    return float(stats.kendalltau(x, y, variant="b").statistic) if _varied(x, y) else math.nan


def plcc(scores: Values, ratings: Values, fit: bool = False) -> float:
    """Pearson's linear correlation.

    Args:
        fit: first map the scores through the logistic curve that fits the ratings best (see
            :func:`logistic_fit`), as in quality assessment, where a scale may be bent. NaN where
            there is no such fit.
    """
    x, y = _arrays(scores, ratings)
    if not _varied(x, y):
        return math.nan
    if fit:
        fitted = logistic_fit(x, y)
        if fitted is None or not _varied(fitted, y):
            return math.nan
        x = fitted
    return float(stats.pearsonr(x, y).statistic)


def logistic_fit(scores: Values, ratings: Values) -> Array | None:
    """Scores mapped onto the ratings by the four-parameter logistic curve of VQEG.

    ``f(x) = b_2 + (b_1 - b_2) / (1 + exp(-(x - b_3) / |b_4|))``, least squares; ``None`` where
    the fit does not converge or there are fewer than five values.
    """
    x, y = _arrays(scores, ratings)
    if len(x) < FEWEST_FOR_FIT:
        return None
    start = [y.max(), y.min(), x.mean(), x.std() or 1.0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optimize.OptimizeWarning)
            found, _ = optimize.curve_fit(_logistic, x, y, p0=start, maxfev=20_000)
    except RuntimeError:  # scipy's word for "did not converge"
        return None
    return _logistic(x, *found)


def _logistic(x: Array, b1: float, b2: float, b3: float, b4: float) -> Array:
    steepness = np.clip((x - b3) / max(abs(b4), 1e-12), -500, 500)  # exp must not overflow
    return np.asarray(b2 + (b1 - b2) / (1 + np.exp(-steepness)))


def _arrays(scores: Values, ratings: Values) -> tuple[Array, Array]:
    x, y = np.asarray(scores, float), np.asarray(ratings, float)
    if x.shape != y.shape:
        raise ValueError(f"{len(x)} scores for {len(y)} ratings; give one each")
    return x, y


def _varied(x: Array, y: Array) -> bool:
    return len(x) >= FEWEST and np.ptp(x) > 0 and np.ptp(y) > 0
