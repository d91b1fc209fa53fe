r"""Which steps are noisy and trained: MixGRPO's sliding window (2507.21802).

The window moves from the noisy end to the clean one by ``window_stride``, staying at each position
for ``window_every`` steps of training (``progressive``), or, further down where pictures hardly
change any more, for fewer (``decay``):
:math:`\lceil N_0 \exp(-\kappa \max(l - l_0, 0)) \rceil` at position :math:`l`.  After the last
position it starts over; a run would otherwise train the same few steps for ever.  ``random`` draws
a position anew each step (Flow-GRPO-Fast).

The position is a function of seed and step alone, hence equal on all processes and after a resume.
"""

from __future__ import annotations

import math
import random

from mmalign.runtime.seeds import stable_seed
from trainers.config import RolloutConfig


def positions(rollout: RolloutConfig) -> list[tuple[int, int]]:
    """First steps of the window in their order, each with the training steps it stays."""
    low, high = rollout.window_start
    return [(at, _stay(rollout, at)) for at in range(low, high + 1, rollout.window_stride)]


def _stay(rollout: RolloutConfig, at: int) -> int:
    if rollout.window_strategy != "decay":
        return rollout.window_every
    beyond = max(at - rollout.window_decay_from, 0)
    return math.ceil(rollout.window_every * math.exp(-rollout.window_decay * beyond))


def window_of_step(rollout: RolloutConfig, seed: int, step: int) -> tuple[int, ...]:
    """The grid steps of the window in training step ``step``."""
    if rollout.window_strategy == "random":
        rng = random.Random(stable_seed("window", seed, step))
        start = rng.randint(*rollout.window_start)
    else:
        cycle = [start for start, stay in positions(rollout) for _ in range(stay)]
        start = cycle[step % len(cycle)]
    return tuple(range(start, start + rollout.window))
