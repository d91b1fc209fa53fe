"""How often a reward prefers what people prefer: pair accuracy in its published variants.

Throughout, ``labels`` are what people said of each pair: 1 for the first, -1 for the second, 0 for
a tie; ``differences`` are score of the first minus score of the second. Both are ``(N,)``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Values = Sequence[float] | Array
Mode = Literal["compat", "fixed"]
Ties = Literal["free", "order", "half"]
THRESHOLDS = tuple(k / 10 for k in range(11))  # those that Pick-a-Pic tries on validation


def strict_points(labels: Values, differences: Values) -> Array:
    """1 or 0 of each pair that people did not tie; a predicted tie is wrong."""
    h, d = _decided(labels, differences)
    return (h * d > 0).astype(float)


def half_credit_points(labels: Values, differences: Values) -> Array:
    """As :func:`strict_points`, but a predicted tie counts one half, which is its chance level."""
    h, d = _decided(labels, differences)
    return np.where(d == 0, 0.5, (h * d > 0).astype(float))


def accuracy_without_ties(labels: Values, differences: Values) -> float:
    """Mean of :func:`strict_points`: ``C / (C + D + T_m)``; NaN where people tied every pair."""
    points = strict_points(labels, differences)
    return float(points.mean()) if len(points) else math.nan


def accuracy_with_ties(labels: Values, differences: Values, mode: Mode = "fixed") -> float:
    """Pair accuracy with calibrated ties (Deutsch et al. 2023, arXiv:2305.14324).

    A pair is predicted as a tie where ``|difference| <= epsilon``. The accuracy is
    ``(C + T_hm) / N``, concordant pairs plus ties of both, at the best ``epsilon``, which is
    chosen on these very pairs: an optimistic number, as its authors say.

    * ``fixed`` tries no ties at all and every distinct ``|difference|``.
    * ``compat`` is VideoGen-RewardBench's script: it moves through the pairs one by one, so that
      among equal ``|difference|`` the first ones in the file may be ties and the others not, and
      it never considers that nothing is tied.
    """
    h, d = np.asarray(labels, float), np.asarray(differences, float)
    if not len(h):
        return math.nan
    order = np.argsort(np.abs(d), kind="stable")
    h, d = h[order], d[order]
    decided = np.concatenate([(h * d > 0)[::-1].cumsum()[::-1], [0]])  # right among those beyond
    tied = np.concatenate([[0], (h == 0).cumsum()])  # right among those within epsilon
    right = decided + tied  # [k]: the k smallest differences are ties
    if mode == "compat":
        return float(right[1:].max() / len(h))
    last = np.concatenate([np.abs(d)[1:] != np.abs(d)[:-1], [True]])
    steps = [0, *(np.flatnonzero(last) + 1)]
    # Without ties a difference of zero prefers nobody: it is neither concordant nor a tie.
    return float(right[steps].max() / len(h))


def threshold_points(labels: Values, differences: Values, threshold: float = 0.0) -> Array:
    """Pick-a-Pic's points (Kirstain et al. 2023, arXiv:2305.01569), also for human ties.

    The two scores become probabilities by softmax; ``p_1 - p_0 = tanh(difference / 2)``. A tie is
    predicted where that is at most ``threshold`` in absolute value. 1 point where prediction and
    label agree, 1/2 where exactly one of them is a tie, else 0.
    """
    h, d = np.asarray(labels, float), np.asarray(differences, float)
    lead = np.tanh(d / 2)
    predicted = np.where(np.abs(lead) <= threshold, 0.0, np.sign(lead))
    one_tie = (predicted == 0) != (h == 0)
    return np.where(one_tie, 0.5, (predicted == np.sign(h)).astype(float))


def best_threshold(labels: Values, differences: Values) -> float:
    """The first of :data:`THRESHOLDS` with the most points; to be chosen on validation pairs."""
    means = [threshold_points(labels, differences, t).mean() for t in THRESHOLDS]
    return THRESHOLDS[int(np.argmax(means))]


def inversion_score(truth: Values, scores: Values, ties: Ties = "free") -> float:
    """HPSv2's agreement of two rankings: ``1 - inversions / (n (n - 1) / 2)``.

    An inversion is a pair that both sides order, and order oppositely (Wu et al. 2023,
    arXiv:2306.09341). A tie of ``truth`` is free.

    Args:
        truth, scores: ``(n,)``, higher is better.
        ties: of two equal scores. ``free``: no inversion. ``order``: the earlier one is ahead, as
            in the published script, which ranks the scores first. ``half``: half an inversion, so
            that a reward that says the same of everything gets 1/2 of what people ordered.
    """
    a, b = np.asarray(truth, float), np.asarray(scores, float)
    n = len(a)
    if n < 2:
        return math.nan
    if ties == "order":
        b = -np.argsort(np.argsort(-b, kind="stable"), kind="stable").astype(float)
    upper = np.triu_indices(n, 1)
    human, said = (np.sign(x[:, None] - x[None])[upper] for x in (a, b))
    inversions = (human * said < 0).sum() + (0.5 * (human != 0) * (said == 0)).sum() * (
        ties == "half"
    )
    return float(1 - inversions / (n * (n - 1) / 2))


def ranked_pairs(truth: Values, scores: Values) -> tuple[list[int], list[float]]:
    """Label and score difference of every pair of one ranking, in order of their places."""
    count = len(truth)
    places = [(i, j) for i in range(count) for j in range(i + 1, count)]
    labels = [int(np.sign(truth[i] - truth[j])) for i, j in places]
    return labels, [float(scores[i] - scores[j]) for i, j in places]


def acc_plus(correct: Values, questions: Sequence[Hashable]) -> float:
    """ACC+: share of questions all of whose pairs are right; NaN without any.

    Args:
        correct: 1 or 0 of each pair. questions: which question it belongs to.
    """
    whole: dict[Hashable, bool] = {}
    for right, question in zip(correct, questions, strict=True):
        whole[question] = whole.get(question, True) and right == 1
    return sum(whole.values()) / len(whole) if whole else math.nan


def _decided(labels: Values, differences: Values) -> tuple[Array, Array]:
    h, d = np.asarray(labels, float), np.asarray(differences, float)
    if h.shape != d.shape:
        raise ValueError(f"{len(h)} labels for {len(d)} differences; give one each")
    return h[h != 0], d[h != 0]
