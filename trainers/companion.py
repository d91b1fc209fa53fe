"""Networks that learn beside the policy, with an optimiser of their own.

An objective that has a method ``companion(setting)`` gets what it returns in every batch
(``batch.probe.companion``). The loop clears it before an update's micro-batches, lets it learn
after each update that was made, logs what it says, and keeps its state in checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmalign.protocols import Policy, RewardModel
from trainers.config import TrainConfig
from trainers.model import TrainableModel


@dataclass(frozen=True)
class Setting:
    """What a companion is made from."""

    config: TrainConfig
    policy: Policy
    model: TrainableModel
    reward: RewardModel
    accelerator: Any
    dtype: torch.dtype | None


class Companion(Protocol):
    """Learns beside the policy; the same on every process.

    ``nfe`` are the network evaluations that learning has taken so far, on this process.
    """

    nfe: int

    def forget(self) -> None:
        """Drop what the micro-batches of an update have shown; an update begins."""
        ...

    def learn(self) -> dict[str, float]:
        """Learn from what the update's micro-batches have shown; metrics of all processes."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


def build_companion(objective: Any, setting: Setting) -> Companion | None:
    """The companion that the objective asks for, or ``None``."""
    make = getattr(objective, "companion", None)
    return None if make is None else make(setting)


def sum_gradients(parameters: Sequence[nn.Parameter], accelerator: Any) -> None:
    """Sum gradients over processes in one transfer; a missing one counts as 0."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if accelerator.num_processes == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = accelerator.reduce(nn.utils.parameters_to_vector(grads), reduction="sum")
    nn.utils.vector_to_parameters(flat, grads)


def everywhere_sums(values: Sequence[float], accelerator: Any) -> Tensor:
    """Sums of some numbers over processes, fp64 on the accelerator's device or the CPU."""
    own = torch.tensor(list(values), dtype=torch.float64, device=accelerator.device)
    if accelerator.num_processes == 1:
        return own
    return accelerator.reduce(own, reduction="sum")  # type: ignore[no-any-return]
