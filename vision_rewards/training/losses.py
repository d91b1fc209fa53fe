"""Losses of reward models as pure functions of scores; each returns one value for each sample.

Notation: ``d = r_a - r_b`` is the difference of two rewards, ``q`` the probability that a is
preferred, ``sigma`` the logistic function. Outcomes of a comparison are rows ``(win, tie, lose)``
of probabilities that sum to 1, seen from a.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

logsigmoid = F.logsigmoid


def bradley_terry(
    d: Tensor, q: Tensor, margin: Tensor | float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """``-(q log sigma(d - m) + (1 - q) log sigma(-d - m))``, ``(B,)``.

    Bradley & Terry 1952; soft labels ``q`` in [0, 1]. ``smoothing`` eps pulls labels towards their
    opposite: ``q (1 - eps) + (1 - q) eps``. A margin asks the winner to lead by ``m``.
    """
    q = q * (1 - smoothing) + (1 - q) * smoothing
    return -(q * logsigmoid(d - margin) + (1 - q) * logsigmoid(-d - margin))


def gaussian_logit(d: Tensor, std_a: Tensor, std_b: Tensor) -> Tensor:
    """Logit of ``E[sigma(r_a - r_b)]`` for Gaussian rewards, ``(B,)``.

    ``d / sqrt(1 + pi/8 (s_a^2 + s_b^2))``: MacKay's approximation of the logistic-normal integral,
    the preference probability of HPSv3 (Ma et al. 2025, arXiv:2508.03789).
    """
    return d / torch.sqrt(1 + math.pi / 8 * (std_a**2 + std_b**2))


def davidson_log_probabilities(d: Tensor, log_nu: Tensor) -> Tensor:
    """Log-probabilities ``(B, 3)`` of win, tie and lose: ``e^{d/2}, nu, e^{-d/2}`` normalised.

    Davidson 1970, "On extending the Bradley-Terry model to accommodate ties".
    """
    logits = torch.stack([d / 2, log_nu.expand_as(d), -d / 2], dim=-1)
    return logits.log_softmax(-1)


def rao_kupper_log_probabilities(d: Tensor, log_k: Tensor) -> Tensor:
    """Log-probabilities ``(B, 3)`` of win, tie and lose with threshold ``k > 1``.

    Win: ``sigma(d - ln k)``; tie: ``(k^2 - 1) sigma(d - ln k) sigma(-d - ln k)``. Rao & Kupper
    1967; VideoAlign (Liu et al. 2025, arXiv:2501.13918) trains with k = 5.
    """
    win, lose = logsigmoid(d - log_k), logsigmoid(-d - log_k)
    tie = win + lose + torch.log(torch.expm1(2 * log_k))
    return torch.stack([win, tie, lose], dim=-1)


def cross_entropy(log_probabilities: Tensor, outcome: Tensor) -> Tensor:
    """``-sum_o outcome_o log p_o`` over win, tie and lose, ``(B,)``."""
    return -(outcome * log_probabilities).sum(-1)


def hinge(d: Tensor, q: Tensor, margin: Tensor | float = 1.0) -> Tensor:
    """``relu(m - (2q - 1) d)``, ``(B,)``: the loss of PAL's distance forms."""
    return F.relu(margin - (2 * q - 1) * d)


def triplet(d: Tensor, q: Tensor, margin: Tensor | float = 0.3) -> Tensor:
    """Triplet loss with the prompt as anchor, ``(B,)``, from the difference of two cosines.

    For unit vectors ``|t - p|^2 = 2 - 2 cos(t, p)``, so Social Reward's (Isajanyan et al. 2024,
    arXiv:2402.09872) ``relu(|t - p|^2 - |t - n|^2 + m)`` is ``relu(m - 2 d)``.
    """
    return F.relu(margin - 2 * (2 * q - 1) * d)


def centre(scores: Tensor) -> Tensor:
    """``(r_a + r_b)^2``, ``(B,)``, of scores ``(B, 2)``: fixes the zero of Bradley-Terry rewards,
    which comparisons leave open."""
    return scores.sum(-1) ** 2


def plackett_luce(scores: Tensor, ranks: Tensor) -> Tensor:
    """Negative log-likelihood ``(B,)`` of rankings.

    Every ranked item is chosen among those not better than it:
    ``sum_i [logsumexp_{j: rank_j >= rank_i} r_j - r_i]``. Items of equal rank are each chosen
    from the same set (Breslow's treatment of ties); the items of the last place were never chosen
    and only stand in the denominators, so a "best k of n" ranking gives its last n - k one rank.

    Args:
        scores: ``(B, K)``.
        ranks: ``(B, K)``, smaller is better, NaN where there is no item.
    """
    there = ~torch.isnan(ranks)
    filled = ranks.masked_fill(~there, math.inf)
    last = ranks.masked_fill(~there, -math.inf).max(-1, keepdim=True).values
    beaten = (filled[:, None, :] >= filled[:, :, None]) & there[:, None, :]
    pool = scores[:, None, :].masked_fill(~beaten, -math.inf)
    chosen = there & (filled < last)
    # Rows of absent items are all -inf; their logsumexp would have NaN gradients.
    pool = torch.where(chosen[..., None], pool, torch.zeros_like(pool))
    terms = torch.logsumexp(pool, -1) - scores
    return torch.where(chosen, terms, torch.zeros_like(terms)).sum(-1)


def regression(value: Tensor, target: Tensor, delta: float | None = None) -> Tensor:
    """Squared error, or Huber's loss with ``delta`` (in units of the rating), ``(B,)``."""
    if delta is None:
        return (value - target) ** 2
    return F.huber_loss(value, target, reduction="none", delta=delta)


def focal(logit: Tensor, y: Tensor, gamma: float = 2.0, alpha: float | None = None) -> Tensor:
    """``-alpha_t (1 - p_t)^gamma log p_t``, ``(B,)``; ``gamma=0`` without alpha is BCE.

    Lin et al. 2017, arXiv:1708.02002. ``alpha`` weighs the positives, ``1 - alpha`` the negatives.
    Labels ``y`` in [0, 1] may be soft: both terms are then mixed.
    """

    def one_side(z: Tensor) -> Tensor:
        return -((1 - torch.sigmoid(z)) ** gamma) * logsigmoid(z)

    positive, negative = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    return positive * y * one_side(logit) + negative * (1 - y) * one_side(-logit)


def cross_prompt(
    scores: Tensor,
    y: Tensor,
    margin: float = 3.0,
    win_win: float = 1.0,
    smoothing: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean loss (a scalar) of all pairs that single pass/fail labels give, whatever the prompt.

    Every passed sample beats every failed one by the margin, ``-log sigma(d - m)``; two passed
    samples should tie, ``-log sigma(d - m) - log sigma(-d - m)``, which keeps the good ones in a
    compact interval. SoliReward (Lian et al. 2025, arXiv:2512.22170): m = 3, both
    terms weigh 1.

    Args:
        scores: ``(B,)``. y: ``(B,)``, passed where above 0.5.
        weight: ``(B,)``, of the samples; a pair weighs the product of its two.

    Returns:
        Zero (with a gradient of zero) for a batch that forms no pair.
    """
    up, down = y > 0.5, y <= 0.5
    passed, failed = scores[up], scores[down]
    weight = torch.ones_like(scores) if weight is None else weight
    loss = scores.sum() * 0.0
    if len(passed) and len(failed):
        d = (passed[:, None] - failed[None, :]).flatten()
        each = bradley_terry(d, torch.ones_like(d), margin, smoothing)
        loss = loss + weighted_mean(each, (weight[up][:, None] * weight[down][None, :]).flatten())
    if len(passed) > 1 and win_win:
        i, j = torch.triu_indices(len(passed), len(passed), 1, device=scores.device)
        d = passed[i] - passed[j]
        each = -(logsigmoid(d - margin) + logsigmoid(-d - margin))
        loss = loss + win_win * weighted_mean(each, weight[up][i] * weight[up][j])
    return loss


def weighted_mean(each: Tensor, weight: Tensor) -> Tensor:
    """``sum w l / sum w``, a scalar; 0 where nothing weighs anything."""
    return (weight * each).sum() / weight.sum().clamp_min(1e-12)
