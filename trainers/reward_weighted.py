r"""Flow matching on weighted samples of one's own: RAFT and reward-weighted flow matching.

.. math:: L = w \, \mathrm{mean}_D (v_\theta(x_\sigma) - (\epsilon - x_0))^2
              + \alpha \, \mathrm{mean}_D (v_\theta - v_{ref})^2

with weights of mean 1 in each group. RAFT (Dong et al., 2304.06767) keeps the best samples; ORW-CFM
with its W2 regularisation (Fan et al., 2502.06061) weighs all of them by the exponential of their
reward. Both move the model towards :math:`p_{old}(x) w(x)`; repeated without
:math:`\alpha`, all the way to the best sample. AWM with advantages of 0 and 1 is RAFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmalign.config import ConfigError
from trainers.matching import ErrorForm, distance, matching_error, not_negative, positive, weighed
from trainers.objective import ForwardBatch, Process


@dataclass(frozen=True, kw_only=True)
class _WeightedMatching:
    """What both methods share: the loss."""

    process: ClassVar[Process] = "forward"

    w2_beta: float = 0.0
    error: ErrorForm = "plain"

    def __post_init__(self) -> None:
        not_negative(w2_beta=self.w2_beta)

    @property
    def needs(self) -> frozenset[str]:
        """Which extra passes the loop must make for this objective."""
        return frozenset({"reference"} if self.w2_beta > 0 else ())

    def loss(self, batch: ForwardBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample loss ``(b,)`` and metrics; ``batch.advantage`` holds the weights."""
        error = matching_error(batch, batch.velocity)
        loss = batch.advantage.double() * weighed(error, batch.sigma, self.error)
        metrics = {"error": error.detach()}
        if self.w2_beta > 0:
            away = distance(batch.velocity, batch.others["reference"])
            loss = loss + self.w2_beta * away
            metrics["reference_distance"] = away.detach()
        return loss, metrics


@dataclass(frozen=True, kw_only=True)
class Raft(_WeightedMatching):
    """RAFT: fine-tune on the best samples of each group, then sample again.

    Attributes:
        top: samples of a group that are kept, by reward; ties with the last of them are kept too.
        w2_beta: weight of the squared distance to the reference velocity; 0 spares its pass.
        error: form of the flow-matching error, see :func:`trainers.matching.weighed`.
    """

    top: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(top=self.top)

    def weights(self, advantages: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        """``(B,)``: equal on the chosen samples of a group, 0 on others, mean 1 in the group.

        A group whose rewards are all equal has no best sample and gets 0.
        """
        result = torch.zeros_like(advantages)
        for rows in _spread_groups(advantages, groups, valid):
            values = advantages[rows]
            last = values.sort(descending=True).values[min(self.top, len(rows)) - 1]
            chosen = values >= last
            result[rows[chosen]] = len(rows) / chosen.sum()
        return result


@dataclass(frozen=True, kw_only=True)
class RewardWeighted(_WeightedMatching):
    r"""ORW-CFM-W2: every sample counts by the exponential of its advantage.

    Attributes:
        temperature: :math:`\tau` of :math:`w \propto \exp(A / \tau)`. With ``advantage.std: none``
            this is :math:`\exp(r / \tau)`, otherwise rewards are measured in deviations.
        w2_beta: :math:`\alpha`, which bounds the squared Wasserstein distance to the reference.
        floor: samples of a smaller weight get 0 and are left out, of the second term too: with a
            small temperature that is most of them, and their passes are better spent on more draws
            of the others. 0 keeps all.
        error: form of the flow-matching error, see :func:`trainers.matching.weighed`.
    """

    temperature: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(temperature=self.temperature)
        not_negative(floor=self.floor)
        if self.floor >= 1:
            raise ConfigError(
                f"objective.floor is {self.floor}; weights have mean 1, so give one below 1"
            )

    @property
    def zero_without_advantage(self) -> bool:
        """Whether samples of weight 0 may be left out."""
        return self.floor > 0 or self.w2_beta == 0

    def weights(self, advantages: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        """``(B,)``: a softmax over each group times its size; 0 in a group without spread."""
        result = torch.zeros_like(advantages)
        for rows in _spread_groups(advantages, groups, valid):
            weights = len(rows) * torch.softmax(advantages[rows] / self.temperature, 0)
            weights = torch.where(weights < self.floor, 0.0, weights)
            result[rows] = weights * len(rows) / weights.sum()
        return result


def _spread_groups(advantages: Tensor, groups: Tensor, valid: Tensor) -> list[Tensor]:
    """Row numbers of the scored samples of each group in which rewards differ."""
    groups = groups.to(advantages.device)
    found = (torch.nonzero((groups == g) & valid).flatten() for g in torch.unique(groups))
    return [rows for rows in found if len(rows) and float(advantages[rows].std(False)) > 1e-6]
