"""The processes of one evaluation: what each does, and how they hear of each other.

Work is shared out by prompt.  Noise belongs to (prompt, sample), so who makes a picture changes
nothing about it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from mmalign.protocols import Request

PATIENCE = timedelta(hours=24)  # for the slowest process; the first may judge what others made


@dataclass(frozen=True)
class Workers:
    """Process ``rank`` of ``count``. Every method but :meth:`share` is called by all of them."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def main(self) -> bool:
        """Whether this process reads and writes what belongs to all."""
        return self.rank == 0

    def share(self, requests: Sequence[Request]) -> list[Request]:
        """What of ``requests`` this process does: whole prompts, taken in turn."""
        if self.count == 1:
            return list(requests)
        number = {p: i for i, p in enumerate(dict.fromkeys(r.prompt for r in requests))}
        return [r for r in requests if number[r.prompt] % self.count == self.rank]

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """Everybody's items, in everybody's hands."""
        if self.count == 1:
            return list(items)
        parts: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def from_main(self, value: Any) -> Any:
        """The first process' value."""
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def launched() -> bool:
    """Whether a launcher (accelerate, torchrun) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: str = "auto") -> Workers:
    """The workers this process is one of; alone where no launcher started several.

    Args:
        device: ``cpu`` lets processes talk through gloo on any machine.
    """
    if not launched():
        return Workers()
    from accelerate import PartialState

    cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    return Workers(state.process_index, state.num_processes, state.device)
