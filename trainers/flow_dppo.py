r"""Flow-DPPO (2606.11025): a trust region of distributions in place of a clip of ratios.

The KL between the transitions of the current policy and of the one that sampled is exact,
:math:`D = \|\mu_\theta - \mu_{old}\|^2 / 2 s^2` (averaged over elements).  A sample is left out of
the policy loss :math:`-A \rho` where :math:`D` has reached ``divergence`` *and* its gradient leads
further away: :math:`A > 0, \rho > 1` or :math:`A < 0, \rho < 1`.  A ratio is one noisy number per
transition; the divergence is what it estimates, so nothing is stopped by chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.flow_grpo import FlowGrpo
from trainers.objective import StepBatch


@dataclass(frozen=True, kw_only=True)
class FlowDppo(FlowGrpo):
    """The Flow-DPPO objective: Flow-GRPO's KL options, and

    Attributes:
        divergence: largest KL to the policy that sampled, per latent element.
    """

    divergence: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence <= 0:
            raise ValueError(f"divergence must be positive, got {self.divergence}")
        if (self.clip_range, self.clip_range_high) != (1e-4, None):
            raise ValueError(
                "clip_range means nothing here: flow_dppo stops samples by their divergence. "
                "Remove it and set divergence"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The means of the policy that sampled, besides what the KL needs."""
        return super().needs | {"old_mean"}

    def policy_loss(self, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """``-A rho`` of the samples inside the region or on their way back, ``(b,)``; metrics."""
        assert batch.old_mean is not None
        ratio = torch.exp(batch.log_prob - batch.old_log_prob)
        variance = 2 * batch.step.std.detach().square()
        moved = (batch.step.mean.detach() - batch.old_mean).square() / variance
        divergence = moved.flatten(1).mean(1)
        away = batch.advantage * (ratio.detach() - 1) > 0
        stopped = away & (divergence >= self.divergence)
        loss = torch.where(stopped, 0.0, -batch.advantage * ratio)
        metrics = {"ratio": ratio.detach(), "clip": stopped.float(), "divergence": divergence}
        return loss, metrics
