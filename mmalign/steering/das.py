r"""DAS: particles that are proposed along the reward's gradient, and tempered (2501.05803).

Draws from :math:`p(x_0 | c)\, e^{\lambda r(x_0, c)}` like FK steering, with fewer particles lost:
a particle at :math:`x` moves by the sampler's own step :math:`N(m, s^2)` shifted uphill,

.. math:: x' = m + s^2 G + s z, \qquad G = \lambda_{i+1} \nabla_x r(\hat x_0(x)),

and what the shift did to its chances is taken back by its weight:

.. math:: \log W \mathrel{+}= \underbrace{-\tfrac12 s^2 \|G\|^2 - s\, G \cdot z}_{\log p/q}
   + \lambda_{i+1} r(\hat x_0(x')) - \lambda_i r(\hat x_0(x)).

The strength grows with the steps, :math:`\lambda_i = \lambda \min((1 + \gamma)^i - 1, 1)`, because
early estimates are poor.  Particles of a prompt are resampled when their effective size falls below
half (SSP).  The last weight uses the reward of the finished sample, so that the weighted particles
approximate the target law however good the gradients are.

Everything of a particle moves with it when it is resampled: its state, its prediction, its gradient
and its memory of the last potential.  (The released code seems to leave the gradients behind.)
The paper's ``alpha`` is ``1 / strength``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmalign.protocols import Kernel, Policy, RewardModel, Steered
from mmalign.runtime.progress import track
from mmalign.sampling.fit import deterministic, fitted
from mmalign.sampling.process import like
from mmalign.steering.common import Sampling
from mmalign.steering.engine import Engine, Watch, scored
from mmalign.steering.feynman_kac import Choose, Filter, Rule, check_choose
from mmalign.steering.fk import chosen_kernel
from mmalign.steering.gradient import Through, clipped, norms, outlook
from mmalign.steering.particles import Noise, Scheme
from mmalign.types import Score

# Share of the steps after which the strength is full; the paper's two settings agree on it.
FULL_AT = 0.87


@dataclass(frozen=True, kw_only=True)
class Das(Sampling):
    """Steer ``k`` particles a prompt along the reward's gradient.

    Args:
        k: particles a prompt; a budget may allow fewer.
        strength: lambda; what one unit of reward is worth. The paper takes 100 for CLIP, 200 for
            an aesthetic score, 10,000 for PickScore.
        tempering: gamma; ``None`` reaches full strength after 87 % of the steps, as the paper's
            0.008 at 100 steps and 0.1 at 8 do.
        limit: longest shift, in norms of the step's own noise; ``None`` is no limit. The weights
            know the shift that was made, so the target law is the same, but a long shift along the
            gradient of a poor estimate leads away from pictures.
        through: ``denoiser`` follows the gradient through the network, ``fixed`` does without.
        scheme, threshold: of resampling, see :class:`~mmalign.steering.feynman_kac.Rule`.
        choose: what the chosen particle has most of: ``weight`` or ``reward``; ``draw`` draws one.
        kernel, kernel_options: of the steps, as in :class:`~mmalign.steering.fk.Fk`.

    Raises:
        ValueError: an option out of range.
    """

    method: ClassVar[str] = "das"

    batch_size: int = 8
    k: int = 4
    strength: float = 10.0
    tempering: float | None = None
    limit: float | None = 0.1
    through: Through = "denoiser"
    scheme: Scheme = "ssp"
    threshold: float | None = 0.5
    choose: Choose = "weight"
    kernel: str | Kernel | None = None
    kernel_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check(k=1)
        check_through(self.method, self.through)
        check_choose(self.choose)
        self.rule(10)
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"das: limit must be above 0, or None for none, got {self.limit}")

    def rule(self, steps: int) -> Rule:
        """How weights are made on a grid of ``steps``."""
        gamma = self.tempering
        if gamma is None:
            gamma = 2 ** (1 / (FULL_AT * steps)) - 1
        return Rule(
            potential="difference", strength=self.strength, tempering=gamma, scheme=self.scheme,
            threshold=self.threshold,
        )  # fmt: skip

    @torch.no_grad()
    def run(
        self, policy: Policy, reward: RewardModel, prompts: Sequence[str], *, budget: Any = None,
        watch: Watch | None = None,
    ) -> Steered:  # fmt: skip
        """Steer one sample per prompt; all particles are returned, with weight and lineage.

        A budget of evaluations, pictures or decodes lowers the number of particles. When the time
        is over, each prompt goes on with its heaviest particle alone, without gradients.

        Raises:
            ValueError: a reward without gradient, a kernel that does not fit the policy, or as
                :class:`~mmalign.steering.engine.Engine` says. BudgetError: not even one particle
                is allowed.
        """
        kernel = chosen_kernel(self.kernel, self.kernel_options, policy.parameterisation)
        kernel = fitted(kernel, policy)
        engine = self.engine(policy, reward, prompts, budget, watch, gradient=True)
        pictures = engine.steps + 1
        cost = {"nfe": engine.steps * engine.evaluations, "decodes": pictures}
        k = engine.afford(self.k, "particle", reward_calls=pictures, **cost)
        return _Run(self, engine, kernel, k).result()


class _Run:
    """One run of the method: the loop over the sampler's steps."""

    def __init__(self, method: Das, engine: Engine, kernel: Kernel, k: int) -> None:
        self.method, self.engine, self.kernel = method, engine, kernel
        self.sigmas, self.guided = engine.sigmas(), True
        self.owners = engine.owners(k)
        self.seeds = engine.seeds(self.owners, seed=method.seed)
        self.noise = Noise(self.seeds)
        rule = method.rule(engine.steps)
        self.filter = Filter(engine.prompts, k, rule, key=(engine.method, method.seed))
        self.filter.state["x"] = engine.policy.init_noise(self.seeds)

    def result(self) -> Steered:
        """From the first step to the chosen pictures."""
        engine = self.engine
        with track("steps", engine.steps, enabled=engine.watch is None) as advance:
            for n in range(engine.steps):
                self._mind_the_time(n)
                scores = self._look(n)
                if n and scores is not None:
                    self.filter.visit(scores, n, engine.steps, float(self.sigmas[n]))
                    self._show(n, scores)
                self._move(n)
                advance(1)
        return self._finish()

    def _look(self, n: int) -> Score | None:
        """Predictions and, while there is time, gradients of all particles' states."""
        state, sigma = self.filter.state, self.sigmas[n]
        if not self.guided:
            state["prediction"] = self.engine.predict(state["x"], sigma, self.owners)
            state["gradient"] = torch.zeros_like(state["x"])
            return None
        found = outlook(self.engine, state["x"], sigma, self.owners, self.method.through)
        state["prediction"], state["gradient"] = found.prediction, found.ascent.gradient
        return found.ascent.scores

    def _move(self, n: int) -> None:
        """One shifted step of all particles, and what it means for their weights."""
        state, engine = self.filter.state, self.engine
        last = n == engine.steps - 1 and engine.policy.parameterisation == "flow"
        kernel = deterministic("flow") if last else self.kernel
        noise = self.noise.draw(state["x"])
        step = kernel.step(
            state["x"], self.sigmas[n], self.sigmas[n + 1], state["prediction"], noise
        )
        std = like(step.std, state["x"]).to(noise)
        pull = state["gradient"] * self.filter.rule.strength_at(n + 1, engine.steps)
        shift = std.square() * pull
        if self.method.limit is not None:
            longest = self.method.limit * norms(std * torch.ones_like(noise))
            shift = clipped(shift, longest)
        state["x"] = step.x_next + shift
        self.filter.population.reweigh(log_ratio(shift, std, noise))

    def _mind_the_time(self, n: int) -> None:
        if n == 0 or not self.guided or self.engine.meter.allows():
            return
        rows = self.filter.hurry(n, self.engine.steps)
        self.owners, self.guided = self.owners[rows], False
        self.noise.keep(rows)

    def _show(self, n: int, scores: Score) -> None:
        values = torch.where(scored(scores), scores.value, -torch.inf)
        best = values.view(len(self.engine.prompts), -1).amax(1)
        self.engine.show(n, self.engine.steps, torch.where(torch.isfinite(best), best, torch.nan))

    def _finish(self) -> Steered:
        engine, steps = self.engine, self.engine.steps
        media, scores = engine.judge(self.filter.state["x"], self.owners)
        self.filter.last(scores, steps)
        self._show(steps, scores.to("cpu"))
        normaliser = self.filter.population.log_normaliser.tolist()
        trace = [
            {**line, "log_normaliser": normaliser[line["prompt"]]}
            if line["event"] == "last" else line for line in self.filter.trace
        ]  # fmt: skip
        return engine.finish(
            media, scores, self.owners, self.filter.lineage(self.seeds), trace,
            self.filter.order(self.method.choose, scores),
        )  # fmt: skip


def log_ratio(shift: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """``log p - log q`` ``(B,)`` fp64 of ``m + shift + std noise``, drawn from the shifted step.

    Where ``std`` is 0 nothing can be shifted, and the ratio is 1.
    """
    shift, std, noise = shift.double(), std.double(), noise.double()
    moved = torch.where(std > 0, shift / std.clamp(min=1e-30), 0.0)
    return -(0.5 * moved.square() + moved * noise).flatten(1).sum(1)


def check_through(method: str, through: str) -> None:
    """Raises ``ValueError`` for a path of the gradient that does not exist."""
    if through not in ("denoiser", "fixed"):
        raise ValueError(f"{method}: through must be denoiser or fixed, got {through!r}")


__all__ = ["Das", "log_ratio"]
