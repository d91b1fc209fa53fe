r"""TurningPoint-GRPO (2602.06422): steps that turn a trajectory around get its long-term credit.

With values :math:`R_0, \dots, R_S` of the states around the recorded steps and :math:`R^*` the
reward of the picture, step :math:`k \ge 1` gains :math:`d_k = R_k - R_{k-1}`, and
:math:`s_k = \mathrm{sign}(d_k)\,\mathrm{sign}(R^* - R_0)` says whether it went the way that the
trajectory went on the whole.  A step is a *turning point* if the one before it went against that
way, it goes with it, and what follows agrees with it:

.. math:: s_{k-1} < 0, \quad s_k > 0, \quad \mathrm{sign}(d_k) = \mathrm{sign}(R^* - R_k).

The first step has none before it and needs only the last condition.  A turning point is credited
with all that came of it, :math:`R^* - R_{k-1}`, in place of :math:`d_k`.  Signs of 0 never qualify.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.advantages import step_advantage
from trainers.credit import Credit
from trainers.dense_grpo import DenseGrpo


@dataclass(frozen=True, kw_only=True)
class TurningPointGrpo(DenseGrpo):
    """The TurningPoint-GRPO objective: DenseGRPO's options, and

    Attributes:
        balance: keep as many raises as losses among the turning points of a step of training,
            those with the largest credit; the others keep their own gain.
    """

    balance: bool = True

    def advantage(self, credit: Credit) -> Tensor:
        """Credits normalised group by group and step by step, ``(B, S)``."""
        gains, valid = credit.gains()
        values, scored = credit.states()
        final = torch.where(credit.score.valid, credit.score.value, torch.nan)
        # A comparison with NaN is false: nothing turns where a value is missing.
        values = torch.where(scored, values, torch.nan)
        points, credits = turning_points(values, final)
        if self.balance:
            points = balanced(points, credits)
        options = credit.options
        rewards = torch.where(points, credits, gains)
        return step_advantage(rewards, valid, credit.groups, options.std, options.eps)


def turning_points(values: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """Turning points ``(B, S)`` bool of values ``(B, S + 1)`` and final rewards ``(B,)``.

    Also the long-term credit ``R* - R_{k-1}`` of every step, ``(B, S)``.
    """
    gains = values[:, 1:] - values[:, :-1]
    whole = (final - values[:, 0]).sign()[:, None]
    along = gains.sign() * whole
    agrees = gains.sign() * (final[:, None] - values[:, 1:]).sign() > 0
    turned = torch.zeros_like(agrees)
    turned[:, 0] = True
    turned[:, 1:] = (along[:, :-1] < 0) & (along[:, 1:] > 0)
    return turned & agrees, final[:, None] - values[:, :-1]


def balanced(points: Tensor, credits: Tensor) -> Tensor:
    """As many positive as negative ones of ``points``, the largest by size of their credit."""
    up, down = points & (credits > 0), points & (credits < 0)
    count = int(min(up.sum(), down.sum()))
    kept = torch.zeros_like(points)
    for side in (up, down):
        size = torch.where(side, credits.abs(), -1.0).flatten()
        kept.view(-1)[size.argsort(descending=True, stable=True)[:count]] = True
    return kept & points
