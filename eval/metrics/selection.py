"""What is chosen by a reward: best of N, win rates, and votes that know two kinds of ties."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from eval.metrics.pairs import Values

Vote = Literal["A>B", "B>A", "A=B=Good", "A=B=Bad", "A=B"]
VOTES: tuple[Vote, ...] = ("A>B", "B>A", "A=B=Good", "A=B=Bad")


def best_of_n(scores: Values, quality: Values) -> float:
    """Quality of the highest-scored of ``n``; of several equally high ones the mean.

    With quality 1 for the right answer and 0 for others this is RewardBench 2's best of 4
    (Malik et al. 2025, arXiv:2506.01937): a tie among ``k`` that holds the right one is ``1 / k``.
    """
    s, q = np.asarray(scores, float), np.asarray(quality, float)
    if s.shape != q.shape or not len(s):
        raise ValueError(f"{len(s)} scores for {len(q)} qualities; give one each, at least one")
    return float(q[s == s.max()].mean())


def win_rate(preferences: Values) -> float:
    """Mean preference in [0, 1] (1 won, 0 lost, 1/2 tied); NaN without any."""
    p = np.asarray(preferences, float)
    return float(p.mean()) if len(p) else math.nan


def swapped_preference(first: float, second: float) -> float:
    """Preference for a candidate from its preferences shown first and shown second."""
    return (first + second) / 2


def vote_point(human: Vote, predicted: Vote | None) -> float:
    """1 where a vote is right, else 0; TIGER GenAI-Bench (Jiang et al. 2024, arXiv:2406.04485).

    A plain tie, ``A=B``, is accepted for both kinds of human ties, as by the official parser.
    ``None``, an answer without a vote, is wrong there.
    """
    if predicted == "A=B":
        return float(human in ("A=B=Good", "A=B=Bad"))
    return float(predicted == human)


def vote_of(difference: float, threshold: float = 0.0) -> Vote:
    """The vote of two scores: a plain tie where they differ by at most ``threshold``."""
    if abs(difference) <= threshold:
        return "A=B"
    return "A>B" if difference > 0 else "B>A"
