r"""AlignProp: the whole chain with a randomly truncated gradient (2310.03739).

A step :math:`k` is drawn once for every training step; what the network predicts before it is held
constant, while the recursion of the latents itself stays connected:

.. math:: \frac{dr}{d\theta} = \sum_{i \ge k} \frac{\partial r}{\partial x_N}
   J_{N-1} \cdots J_{i+1} B_i \frac{\partial f_i}{\partial\theta}

so that for the weights it is DRaFT-K with a random :math:`K = N - k`. (A widespread copy redraws
the truncation at every step of the sampler, which is another estimator: it keeps the Jacobians
:math:`J_j` of a random subset.) VADER (2407.08737) does the same for videos.

Published losses are :math:`1 - r` and :math:`|r - 10|`, times 1e-2: up to constants ``margin``
with ``weight``.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from mmalign.config import ConfigError
from trainers.gradient.objective import Path, RewardGradient, tail


@dataclass(frozen=True, kw_only=True)
class AlignProp(RewardGradient):
    """Reward back-propagation with randomised truncation.

    Attributes:
        truncation: distribution of :math:`k` among the ``T`` steps: ``uniform`` on 1 .. T - 1;
            ``normal``, redrawn until it lies there; ``fixed`` at ``mean`` T, where 0 is the full
            gradient.
        mean, std: of ``normal``, as shares of ``T``; published 42 and 5 of 50.
    """

    truncation: Literal["normal", "uniform", "fixed"] = "normal"
    mean: float = 0.84
    std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = {"uniform": ("mean", "std"), "fixed": ("std",)}.get(self.truncation, ())
        for name in unused:
            if getattr(self, name) != getattr(AlignProp, name):
                raise ConfigError(
                    f"objective.{name} means nothing with truncation: {self.truncation}; remove it"
                )
        if not 0 <= self.mean < 1:
            raise ConfigError(f"objective.mean is {self.mean}; it must lie in [0, 1)")
        if not self.std > 0:
            raise ConfigError(f"objective.std is {self.std}; it must be above 0")

    def cut(self, steps: int, rng: Random) -> int:
        """``k`` on a grid of ``steps``."""
        if self.truncation == "fixed":
            return min(round(self.mean * steps), steps - 1)
        if self.truncation == "uniform":
            return rng.randint(1, steps - 1)
        while True:
            k = round(rng.gauss(self.mean * steps, self.std * steps))
            if 1 <= k < steps:
                return k

    def path(self, steps: int, rng: Random) -> Path:
        """Predictions before step ``k`` are constants, and nothing before them has a gradient."""
        return Path(tail(steps, self.cut(steps, rng)))
