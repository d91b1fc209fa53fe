r"""ReNO: gradient ascent on the initial noise of a few-step generator (2406.04312).

.. math:: \max_\epsilon\; r(G(\epsilon, c), c) + \lambda K(\epsilon), \qquad
   K(\epsilon) = (d - 1) \log \|\epsilon\| - \tfrac12 \|\epsilon\|^2

where :math:`G` is the whole deterministic sampler and decoder, and :math:`K` the log-density of the
norm of :math:`d` normal numbers (the chi distribution), largest at :math:`\sqrt{d - 1}`.  Each step
clips the gradient to norm ``clip`` and takes a Nesterov step of SGD:

.. math:: m \leftarrow \mu m + g, \qquad \epsilon \leftarrow \epsilon + \eta\,(g + \mu m).

The result is the picture with the best reward on the way, without the prior: so it is never worse
than the start.  Several rewards are weighted by the reward itself (``{"a": 5, "b": 1}``).

The paper optimises one prompt at a time.  Here every prompt has its own clipping, momentum, best
and end; prompts only share network calls.  The noise is kept in fp32, because in fp16 its square
overflows and steps this small round away.  The sampler adds no noise, so there is nothing to seed
again in every iteration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmalign.protocols import Policy, RewardModel, Steered
from mmalign.runtime.log import say
from mmalign.runtime.progress import track
from mmalign.sampling.fit import deterministic
from mmalign.steering.climb import Climb
from mmalign.steering.common import Sampling
from mmalign.steering.engine import Engine, Watch
from mmalign.steering.gradient import clipped, norms, per_row, sampler_gradient

FEW_STEPS = 8  # beyond it, back-propagation through the sampler is slow and its gradient erratic


@dataclass(frozen=True, kw_only=True)
class Reno(Sampling):
    """Optimise the initial noise of each prompt.

    Args:
        iterations: pictures made of each prompt, the first one of the noise as drawn; a budget may
            allow fewer.
        rate: step length of SGD.
        momentum: of SGD, Nesterov's form.
        clip: longest gradient; ``inf`` leaves it as it is.
        prior: lambda, weight of the chi prior; 0 is none.
        patience: a prompt ends after this many iterations without a better picture.
        target: a prompt ends at this score.

    Raises:
        ValueError: an option out of range.
    """

    method: ClassVar[str] = "reno"

    batch_size: int = 8
    iterations: int = 50
    rate: float = 5.0
    momentum: float = 0.9
    clip: float = 0.1
    prior: float = 0.01
    patience: int | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        self.check(iterations=1, patience=1)
        for name, low in (("rate", "above"), ("clip", "above"), ("prior", "from")):
            value = getattr(self, name)
            if not (value > 0 or (low == "from" and value == 0)):
                raise ValueError(f"reno: {name} must be a number {low} 0, got {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"reno: momentum must lie in [0, 1), got {self.momentum}")

    def run(
        self, policy: Policy, reward: RewardModel, prompts: Sequence[str], *, budget: Any = None,
        watch: Watch | None = None,
    ) -> Steered:  # fmt: skip
        """Steer one sample per prompt.

        Raises:
            ValueError: a reward without gradient, or as :class:`~mmalign.steering.engine.Engine`
                says; or a first sample that could not be scored. BudgetError: the budget does not
                allow one picture.
        """
        engine = self.engine(policy, reward, prompts, budget, watch, gradient=True)
        if engine.steps > FEW_STEPS:
            say(
                f"reno: {engine.steps} steps of {policy.name} are back-propagated in every "
                f"iteration; it is made for generators of at most {FEW_STEPS} (shapes-turbo, "
                "shapes-instant). For this one use dno, or best_of_n"
            )
        cost = {"nfe": engine.steps * engine.evaluations, "reward_calls": 1, "decodes": 1}
        iterations = engine.afford(self.iterations, "iteration", **cost)
        seeds = engine.seeds(engine.owners(1), seed=self.seed)
        climb = Climb(engine, seeds, iterations)
        self._climb(engine, climb, policy.init_noise(seeds).float(), iterations)
        return climb.finish()

    def _climb(self, engine: Engine, climb: Climb, noise: Tensor, iterations: int) -> None:
        kernel = deterministic(engine.policy.parameterisation)
        speed = torch.zeros_like(noise)
        with track("iterations", iterations, enabled=engine.watch is None) as advance:
            for iteration in range(iterations):
                live = climb.live(self.patience, self.target)
                if not len(live) or (iteration and not engine.meter.allows()):
                    break
                found = sampler_gradient(engine, noise[live].unsqueeze(1), live, kernel)
                climb.see(iteration, found, live, norm=norms(noise[live]))
                total = found.gradient[:, 0] + self.prior * chi_pull(noise[live])
                noise[live], speed[live] = self._moved(noise[live], speed[live], total)
                advance(1, f"best {float(climb.best.mean()):.3f}")

    def _moved(self, noise: Tensor, speed: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and momentum after one step up."""
        gradient = gradient if math.isinf(self.clip) else clipped(gradient, self.clip)
        speed = self.momentum * speed + gradient
        return noise + self.rate * (gradient + self.momentum * speed), speed


def chi_pull(noise: Tensor) -> Tensor:
    """Gradient of the log-density of each row's norm, ``((d - 1) / |e|^2 - 1) e``."""
    square = noise.flatten(1).square().sum(1).clamp(min=1e-12)
    return per_row((noise[0].numel() - 1) / square - 1, noise) * noise


__all__ = ["Reno", "chi_pull"]
