"""What steering may cost, and what it has cost so far."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from mmalign.protocols import Spent
from mmalign.registry import unknown
from mmalign.runtime.measure import Memory

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "kb": 2**10, "mb": 2**20, "gb": 2**30}


class BudgetError(ValueError):
    """The budget does not allow the least that a method must do."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits **for each prompt**; ``None`` is no limit.

    Attributes:
        nfe: network evaluations, both branches of guidance counted.
        reward_calls: pictures scored.
        decodes: pictures decoded.
        seconds: of wall time, shared evenly between the prompts of a run.
        memory: bytes on CUDA, of the whole process during the run; batches that do not fit are
            made smaller.

    Raises:
        ValueError: a limit that is not positive.
    """

    nfe: int | None = None
    reward_calls: int | None = None
    decodes: int | None = None
    seconds: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.limits().items():
            if not value > 0:
                raise ValueError(f"budget: {name} must be positive, got {value}")

    def limits(self) -> dict[str, float]:
        """The limits that are set."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @staticmethod
    def of(value: Budget | Mapping[str, Any] | str | None) -> Budget:
        """A budget from itself, a mapping, text such as ``nfe=400,memory=8gb``, or nothing.

        Raises:
            ValueError: unknown name (the nearest is named), or a number that cannot be read.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            value = dict(_assignment(part) for part in value.split(",") if part.strip())
        known = [f.name for f in fields(Budget)]
        for name in value or {}:
            if name not in known:
                raise unknown("budget", name, known)
        return Budget(**(value or {}))


def _assignment(text: str) -> tuple[str, float | int]:
    found = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9.]+(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[3].lower() not in _UNITS:
        raise ValueError(
            f"budget {text!r} cannot be read; write limits for each prompt as in "
            "nfe=400,seconds=30 or memory=8gb"
        )
    number = float(found[2]) * _UNITS[found[3].lower()]
    return found[1], number if found[1] == "seconds" else int(number)


def _limit_memory(limit: int | None, device: torch.device) -> None:
    """From here on CUDA refuses more than ``limit`` bytes, and batches are made smaller."""
    if limit is None:
        return
    if device.type != "cuda":
        raise BudgetError(
            f"budget: memory={limit} limits the memory of a GPU, and the policy is on {device}; "
            "leave it out and lower batch_size"
        )
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


class Meter:
    """Counts what a run over ``prompts`` prompts spends, against its budget."""

    def __init__(self, budget: Budget, prompts: int, device: torch.device) -> None:
        self.budget, self.prompts = budget, prompts
        self.nfe = self.reward_calls = self.decodes = 0
        self.working = 0.0
        self._depth = 0
        self._start = time.perf_counter()
        self._device = device
        _limit_memory(budget.memory, device)
        self._memory = Memory(device)

    @property
    def seconds(self) -> float:
        """Wall time since the run began."""
        return time.perf_counter() - self._start

    def allows(
        self, *, nfe: float = 0, reward_calls: float = 0, decodes: float = 0, seconds: float = 0
    ) -> bool:
        """Whether the run may spend this much more, over all its prompts."""
        more = {"nfe": nfe, "reward_calls": reward_calls, "decodes": decodes, "seconds": seconds}
        limits = self.budget.limits()
        return all(
            getattr(self, name) + cost <= limits[name] * self.prompts
            for name, cost in more.items()
            if name in limits
        )

    def most(self, *, nfe: int = 0, reward_calls: int = 0, decodes: int = 0) -> float:
        """How many units of this cost **each prompt** may still have; infinite without a limit.

        Only counts are looked at: what a second buys is known afterwards.
        """
        cost = {"nfe": nfe, "reward_calls": reward_calls, "decodes": decodes}
        limits = self.budget.limits()
        shares = [
            (limits[name] - getattr(self, name) / self.prompts) // unit
            for name, unit in cost.items()
            if unit and name in limits
        ]
        return min(shares, default=float("inf"))

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around calls that any sampler and reward take; what is inside of it counts once."""
        self._depth += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.working += time.perf_counter() - start

    def release(self) -> None:
        """Lift a limit on the memory of the GPU: the run is over."""
        if self.budget.memory is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def spent(self) -> Spent:
        """The bill so far."""
        return Spent(
            nfe=self.nfe, reward_calls=self.reward_calls, decodes=self.decodes,
            seconds=self.seconds, memory=self._memory.peak(), working=self.working,
        )  # fmt: skip
