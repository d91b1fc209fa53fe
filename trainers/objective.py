"""What an objective sees of some samples: one recorded step, or their clean latents noised anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mmalign.config import from_dict
from mmalign.registry import OBJECTIVES
from mmalign.types import Step

Process = Literal["reverse", "forward"]

# Needs that add no term of their own to the loss: where the advantage is 0, the loss is 0 too.
NO_LOSS = frozenset({"values", "history", "old_mean"})


@dataclass(frozen=True)
class StepBatch:
    """One recorded step of ``b`` samples (objectives of the reverse process).

    Attributes:
        log_prob: ``(b,)`` under the current weights, with gradient.
        old_log_prob: ``(b,)`` under the weights that sampled.
        advantage: ``(b,)``.
        step: the replayed transition (mean, std, clean estimate).
        velocity: ``(b, ...)`` the prediction behind it, with gradient.
        reference: the same transition under the reference model, no gradient; ``None`` unless the
            objective needs it.
        reference_velocity: likewise.
        h: ``sigma - sigma_next`` of the step, a scalar tensor.
        old_mean: ``(b, ...)`` mean of the transition under the policy that sampled; ``None``
            unless the objective needs it.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    step: Step
    velocity: Tensor
    reference: Step | None
    reference_velocity: Tensor | None
    h: Tensor
    old_mean: Tensor | None = None


@dataclass(frozen=True)
class ForwardBatch:
    """One draw of (noise level, noise) for ``b`` samples (objectives of the forward process).

    Attributes:
        clean: ``(b, ...)`` the latents that the rollout ended in.
        noise: ``(b, ...)`` standard normal.
        sigma: ``(b,)`` noise levels.
        noised: ``(1 - sigma) clean + sigma noise``.
        velocity: ``(b, ...)`` prediction at ``noised``, with gradient.
        advantage: ``(b,)``, or what the objective's ``weights`` made of it.
        others: the prediction under each version of the weights that the objective needs:
            ``reference``, and the names of its ``copies``. No gradient.
        pooled: ``(b, K)`` fp64, the mean of the objective's ``statistic`` over each sample's group,
            on all processes; ``None`` for objectives without one.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    noised: Tensor
    velocity: Tensor
    advantage: Tensor
    others: Mapping[str, Tensor]
    pooled: Tensor | None = None

    @property
    def target(self) -> Tensor:
        """The velocity of the straight path through this draw: ``noise - clean``."""
        return self.noise - self.clean

    @property
    def level(self) -> Tensor:
        """``sigma``, shaped to broadcast against latents."""
        return self.sigma.reshape(-1, *([1] * (self.clean.ndim - 1)))


def build_objective(name: str, options: Any) -> Any:
    """An objective by registered name with its options, strictly checked."""
    return from_dict(OBJECTIVES.load(name), options, where="objective")


def process_of(objective: Any) -> Process:
    """The objective's ``process``: ``reverse`` (recorded steps) unless it says ``forward``."""
    process: Process = getattr(objective, "process", "reverse")
    if process not in ("reverse", "forward"):
        raise ValueError(
            f"{type(objective).__name__}.process is {process!r}; it must be 'reverse' or 'forward'"
        )
    return process
