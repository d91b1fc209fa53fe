"""A resumable count of steps, and the schedule that the small reward models share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from mmalign.runtime.files import atomic_path
from mmalign.runtime.log import say


class Stateful(Protocol):
    """What can be saved and restored: modules and optimisers."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Undo :meth:`state_dict`."""
        ...


def resumable_steps(
    path: Path, parts: Mapping[str, Stateful], total: int, save_every: int
) -> Iterator[int]:
    """Step numbers up to ``total``, continuing from ``path`` and saving ``parts`` to it.

    What a step draws must be a function of its number alone; then a run that was stopped ends
    with the weights of one that was not.
    """
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step = int(state["step"])
        say(f"resumed at step {step} of {total}")
    first, started = step, time.time()
    while step < total:
        yield step
        step += 1
        if step % save_every == 0 or step == total:
            saved = {name: part.state_dict() for name, part in parts.items()} | {"step": step}
            with atomic_path(path) as partial:
                torch.save(saved, partial)
            rate = (step - first) / max(time.time() - started, 1e-9)
            say(f"saved at step {step}/{total}, {rate:.2f} steps/s")


def rate_at(step: int, total: int, warmup: int = 100, decay_share: float = 0.5) -> float:
    """Warm-up, constant, then linear decay to zero over the last ``decay_share`` of the steps.

    The warm-up takes at most a tenth of the steps.
    """
    warmup = min(warmup, total // 10 + 1)
    left = (total - step) / max(decay_share * total, 1e-9)
    return min(1.0, (step + 1) / warmup, max(left, 0.0))


def checked(metrics: Mapping[str, float], dials: str) -> str:
    """Metrics in one line.

    Raises:
        FloatingPointError: one is not finite; names the dials to lower.
    """
    if not all(math.isfinite(v) for v in metrics.values()):
        raise FloatingPointError(f"pre-training diverged: {dict(metrics)}; lower {dials}")
    return " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
