r"""AC-Flow (2510.18072): reward-weighted flow matching against a critic of noisy states.

At a draw :math:`x_\sigma` of a sample with normalised reward :math:`\bar r`, a critic
(:mod:`trainers.critic`) says what reward to expect from there; the sample counts by what it is
better than that,

.. math:: A = \mathrm{clip}(\bar r - V(x_\sigma, \sigma, c), \pm c_A), \qquad w = \exp(A / \tau),

.. math:: L = w\,\mathrm{mean}_D (v_\theta - (\epsilon - x_0))^2
              + \alpha\,\mathrm{mean}_D (v_\theta - v_{ref})^2.

Weights lie within :math:`\exp(\pm c_A / \tau)`, :math:`c_A` being ``advantage.clip``.  With
:math:`V = 0` this is ORW-CFM-W2 (:mod:`trainers.reward_weighted`) before its weights are normalised
in each group.  For the first ``warmup`` rollouts only the critic learns.

No code was published; the formulas are reconstructed from the paper's description.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainers.credit import Credit
from trainers.critic import CriticConfig
from trainers.matching import not_negative
from trainers.reward_weighted import RewardWeighted


@dataclass(frozen=True, kw_only=True)
class AcFlow(RewardWeighted):
    r"""The AC-Flow objective: reward-weighted matching's options, and

    Attributes:
        w2_beta: :math:`\alpha`, on by default.
        warmup: rollouts in which the critic learns and the model stays as it is.
        critic: see :class:`trainers.critic.CriticConfig`.
    """

    w2_beta: float = 0.1
    warmup: int = 5
    critic: CriticConfig = field(default_factory=CriticConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(warmup=self.warmup)

    def advantage(self, credit: Credit) -> Tensor:
        """``(B, S)``, one for each draw; the loop clips it."""
        return credit.surprise()

    def weights(self, advantages: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        """``exp(A / tau)``, shaped like the advantages; 0 on unscored samples and below floor."""
        scored = valid.reshape(-1, *([1] * (advantages.ndim - 1)))
        weights = torch.exp(advantages / self.temperature)
        return torch.where(scored & (weights >= self.floor), weights, 0.0)
