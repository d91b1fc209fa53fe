"""Whether a comparison hangs on the order, and whether probabilities mean what they say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from eval.metrics.pairs import Values
from vision_rewards.training.metrics import reliability


def swap_consistency(first: Values, second: Values) -> float:
    """Share of comparisons with the same verdict in both orders; NaN without any.

    Args:
        first, second: ``(N,)`` preference in [0, 1] for the same candidate, shown first and shown
            second. A tie agrees only with a tie.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    return float((np.sign(a - 0.5) == np.sign(b - 0.5)).mean()) if len(a) else math.nan


def position_bias(first: Values, second: Values) -> float:
    """How far, on average, being shown first raises the preference above 1/2; 0 is ideal."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    return float(((a - b) / 2).mean()) if len(a) else math.nan


def calibration(probabilities: Values, outcomes: Values, bins: int = 10) -> dict[str, Any]:
    """Expected calibration error, Brier score and the reliability curve of pair probabilities.

    Args:
        probabilities: ``(N,)`` that the first of a pair wins. outcomes: 1 where it did, else 0.
        bins: equal bins of the predicted winner's probability, from 1/2 to 1.

    ``ece = sum_b n_b / N |share right - mean probability|`` (Guo et al. 2017, arXiv:1706.04599).
    A probability of exactly 1/2 predicts nobody; it counts one half.
    """
    p, won = np.asarray(probabilities, float), np.asarray(outcomes, float)
    confidence = np.maximum(p, 1 - p)
    right = np.where(p == 0.5, 0.5, np.where(p > 0.5, won, 1 - won))
    return reliability(confidence, right, bins=bins, low=0.5)
