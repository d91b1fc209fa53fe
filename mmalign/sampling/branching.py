"""Families of samples that share one trajectory: children of the same state at every step.

At each noisy step every member of a family draws a next state from the one they share, and the
family goes on from a random one of them (SPO, 2406.04314). Continuing from the best would train on
states that the policy alone does not reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CHOICE_STREAM = 0x2545F4914F6CDD1D  # keeps choices apart from the noise of the same seed


class Families:
    """Neighbouring rows of equal ``groups``, of one size, in a batch.

    Attributes:
        size: members of a family.
        first: ``(F,)`` the first row of each.

    Raises:
        ValueError: families of several sizes, or rows of one that are no neighbours.
    """

    def __init__(self, groups: Tensor, seeds: Sequence[int]) -> None:
        ids, counts = torch.unique_consecutive(groups.cpu(), return_counts=True)
        self.size = int(counts[0])
        if len(ids.unique()) != len(ids) or bool((counts != self.size).any()):
            raise ValueError(
                f"a branching rollout needs the rows of each group side by side, as many of each, "
                f"got groups {groups.tolist()}"
            )
        self.first = torch.arange(0, len(groups), self.size)
        self._choices = [
            torch.Generator().manual_seed(seeds[i] ^ _CHOICE_STREAM) for i in self.first.tolist()
        ]

    def spread(self, values: Tensor) -> Tensor:
        """What belongs to a family, ``(F, ...)``, for each of its members ``(B, ...)``."""
        return values.repeat_interleave(self.size, 0)

    def go_on(self, x: Tensor) -> Tensor:
        """For each member the state of a random one of its family, drawn anew at every call."""
        drawn = [int(torch.randint(self.size, (), generator=g)) for g in self._choices]
        chosen = self.first + torch.tensor(drawn)
        return self.spread(x[chosen.to(x.device)])


def whole_families(groups: Tensor, batch_size: int) -> int:
    """``batch_size``, lowered so that batches hold whole families, or raised to one of them."""
    size = Families(groups, [0] * len(groups)).size
    return max(size, batch_size // size * size)
