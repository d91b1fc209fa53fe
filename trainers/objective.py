"""What an objective sees: one recorded step of some samples, under old and new weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmalign.config import from_dict
from mmalign.registry import OBJECTIVES
from mmalign.types import Step


@dataclass(frozen=True)
class StepBatch:
    """One recorded step of ``b`` samples.

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
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    step: Step
    velocity: Tensor
    reference: Step | None
    reference_velocity: Tensor | None
    h: Tensor


def build_objective(name: str, options: Any) -> Any:
    """An objective by registered name with its options, strictly checked."""
    return from_dict(OBJECTIVES.load(name), options, where="objective")
