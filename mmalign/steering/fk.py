r"""FK steering: particles that interact on the way (Singhal et al., 2501.06848).

Draws from :math:`p(x_0 | c)\, e^{\lambda r(x_0, c)}` with ``k`` particles for each prompt, a
stochastic sampler and any reward, black boxes included.  After some of the steps every particle is
weighed by the reward of its clean estimate :math:`\hat x_0`, and particles are resampled by weight;
:mod:`mmalign.steering.feynman_kac` has the equations.

Departures from the released code, which measurably misses the target law: weights are carried over
when resampling is skipped, and the last weight uses the reward of the finished sample under every
potential.  The estimate is that of the state that is resampled, and free: its network call is the
next step's prediction.  The kernel is stochastic on flow models too; copies would never separate
under their ODE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmalign.protocols import Kernel, Parameterisation, Policy, RewardModel, Steered
from mmalign.registry import unknown
from mmalign.runtime.progress import track
from mmalign.sampling.fit import deterministic, fitted
from mmalign.sampling.kernels import build_kernel
from mmalign.steering.common import Sampling
from mmalign.steering.engine import Engine, Watch, scored
from mmalign.steering.feynman_kac import (
    Choose,
    Filter,
    Potential,
    Rule,
    check_choose,
    visited,
)
from mmalign.steering.particles import Noise, Scheme
from mmalign.types import Media, Score

# At the 16 steps of shapes-flow unsteered particles of cps lose quality, those of this one do not.
FLOW = "flow_sde"
Decoder = Callable[[Tensor], Media]


@dataclass(frozen=True, kw_only=True)
class Fk(Sampling):
    """Steer ``k`` interacting particles a prompt.

    A particle's noises are made of ``seed``, the prompt and its number alone. With ``k = 1`` or
    ``strength = 0`` nothing is visited, and the result is plain stochastic sampling.

    Args:
        k: particles a prompt; a budget may allow fewer.
        potential, strength, tempering, scheme, threshold: see
            :class:`~mmalign.steering.feynman_kac.Rule`. ``strength`` is what one unit of reward
            is worth; 10 is for rewards with a deviation of about 1 between samples.
        start, stop, every: the visits, as shares of the steps (``0.2``) or step numbers (``4``).
        estimate: whose clean estimate is scored: that of the ``new`` state, which is resampled, or
            ``lagged``, of the state before the step that led there. Either is exact.
        choose: what the chosen particle has most of: ``reward``, or ``weight``; ``draw`` draws
            one by weight, which is a sample of the target law.
        kernel: a registered stochastic kernel or an object; ``None`` is ``flow_sde`` for flow
            models and ``ddim`` with eta 1 for diffusion models. On flow models the last step is
            that of the ODE, so that no noise is left in the picture.
        kernel_options: for a kernel given by name.
        decoder: latents to media on the way, where the policy's own decoder is slow; finished
            samples are decoded with the policy's own, so that the result stays exact.
        seed, batch_size, steps, guidance_scale, dtype: as for every method.

    Raises:
        ValueError: an option out of range, or a deterministic kernel.
    """

    method: ClassVar[str] = "fk"

    k: int = 4
    potential: Potential = "difference"
    strength: float = 10.0
    tempering: float | str | None = None
    scheme: Scheme = "systematic"
    threshold: float | None = None
    start: int | float = 0.2
    stop: int | float = 0.8
    every: int | float = 0.2
    estimate: Literal["new", "lagged"] = "new"
    choose: Choose = "reward"
    kernel: str | Kernel | None = None
    kernel_options: Mapping[str, Any] = field(default_factory=dict)
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        self.check(k=1)
        if self.estimate not in ("new", "lagged"):
            raise unknown("estimate", self.estimate, ("new", "lagged"))
        check_choose(self.choose)
        visited(10, self.start, self.stop, self.every)
        self.rule()
        if self.kernel is not None:
            chosen_kernel(self.kernel, self.kernel_options, "")

    def rule(self) -> Rule:
        """How weights are made."""
        return Rule(
            potential=self.potential, strength=self.strength, tempering=self.tempering,
            scheme=self.scheme, threshold=self.threshold,
        )  # fmt: skip

    def visits(self, steps: int) -> tuple[int, ...]:
        """After how many of ``steps`` steps particles are visited; never, where it is no use."""
        if self.k == 1 or self.strength == 0:
            return ()
        return visited(steps, self.start, self.stop, self.every)

    @torch.no_grad()
    def run(
        self,
        policy: Policy,
        reward: RewardModel,
        prompts: Sequence[str],
        *,
        budget: Any = None,
        watch: Watch | None = None,
    ) -> Steered:
        """Steer one sample per prompt; all particles are returned, with weight and lineage.

        A budget of evaluations, pictures or decodes lowers the number of particles. When the time
        is over, each prompt goes on with its heaviest particle alone, unvisited.

        Raises:
            ValueError: as the engine's, or a kernel that does not fit the policy. BudgetError: not
                even one particle is allowed.
        """
        kernel = chosen_kernel(self.kernel, self.kernel_options, policy.parameterisation, FLOW)
        kernel = fitted(kernel, policy)
        engine = self.engine(policy, reward, prompts, budget, watch)
        k, visits = affordable(engine, self.k, self.visits(engine.steps))
        return _Run(self, engine, kernel, k, visits).result()


def chosen_kernel(
    kernel: str | Kernel | None,
    options: Mapping[str, Any],
    parameterisation: str,
    flow: str = "cps",
) -> Kernel:
    """The stochastic kernel that moves samples; ``None`` is ``flow`` or, for diffusion, ``ddim``.

    Raises:
        ValueError: deterministic, or made for another kind of model; says which fit.
    """
    if kernel is None:
        kernel = flow if parameterisation == "flow" else "ddim"
    if isinstance(kernel, str):
        return check_stochastic(build_kernel(kernel, **options))
    if options:
        raise ValueError(f"{', '.join(options)}: set it in the kernel object itself")
    return check_stochastic(kernel)


def check_stochastic(kernel: Kernel) -> Kernel:
    """The kernel itself.

    Raises:
        ValueError: it adds no noise.
    """
    if not kernel.stochastic:
        raise ValueError(
            f"kernel {type(kernel).__name__} adds no noise, so the copies of a particle would "
            "stay equal to the end; use cps, flow_sde or dance_sde for flow models, ddim with eta "
            "above 0 for diffusion models"
        )
    return kernel


def last_kernel(kernel: Kernel, parameterisation: Parameterisation) -> Kernel:
    """The kernel of the last step: on flow models the ODE's, which leaves no noise behind."""
    return deterministic("flow") if parameterisation == "flow" else kernel


def affordable(engine: Engine, k: int, visits: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Particles a prompt and visits that the budget allows.

    Where it does not allow two particles with their visits, it buys particles without.

    Raises:
        BudgetError: not even one.
    """

    def cost(pictures: int) -> dict[str, int]:
        nfe = engine.steps * engine.evaluations
        return {"nfe": nfe, "reward_calls": pictures, "decodes": pictures}

    if visits and engine.meter.most(**cost(1 + len(visits))) < 2:
        visits = ()
    return engine.afford(k, "particle", **cost(1 + len(visits))), tuple(visits)


class _Run:
    """One run of the method: the loop over the sampler's steps."""

    def __init__(
        self, method: Fk, engine: Engine, kernel: Kernel, k: int, visits: tuple[int, ...]
    ) -> None:
        self.method, self.engine, self.kernel, self.visits = method, engine, kernel, visits
        self.owners = engine.owners(k)
        self.seeds = engine.seeds(self.owners, seed=method.seed)
        self.noise = Noise(self.seeds)
        self.filter = Filter(engine.prompts, k, method.rule(), (engine.method, method.seed))
        self.filter.state["x"] = engine.policy.init_noise(self.seeds)

    def result(self) -> Steered:
        """From the first step to the chosen pictures."""
        engine, sigmas = self.engine, self.engine.sigmas()
        with track("steps", engine.steps, enabled=engine.watch is None) as advance:
            for n in range(engine.steps):
                self._mind_the_time(n)
                x = self.filter.state["x"]
                prediction = engine.predict(x, sigmas[n], self.owners)
                self.filter.state["prediction"] = prediction
                if self.method.estimate == "new":
                    self._visit(n, engine.estimate(x, sigmas[n], prediction)[0], sigmas[n])
                clean = self._step(n, sigmas)
                if self.method.estimate == "lagged":
                    self._visit(n + 1, clean, sigmas[n + 1])
                advance(1)
        return self._finish()

    def _step(self, n: int, sigmas: Tensor) -> Tensor:
        """Move every particle; returns the clean estimates of the states before."""
        state, policy = self.filter.state, self.engine.policy
        kernel = self.kernel
        if n == self.engine.steps - 1:
            kernel = last_kernel(kernel, policy.parameterisation)
        noise = self.noise.draw(state["x"])
        step = kernel.step(state["x"], sigmas[n], sigmas[n + 1], state["prediction"], noise)
        state["x"] = step.x_next
        return step.x0

    def _visit(self, n: int, clean: Tensor, sigma: Tensor) -> None:
        """After ``n`` steps: score clean estimates, weigh, resample."""
        if n not in self.visits:
            return
        _, scores = self.engine.judge(clean, self.owners, self.method.decoder)
        self.filter.visit(scores, n, self.engine.steps, float(sigma))
        self._show(n, scores)

    def _show(self, n: int, scores: Score) -> None:
        values = torch.where(scored(scores), scores.value, -torch.inf).cpu()
        best = values.view(len(self.engine.prompts), -1).amax(1)
        shown = torch.where(torch.isfinite(best), best, torch.nan)
        self.engine.show(n, self.engine.steps, shown)

    def _mind_the_time(self, n: int) -> None:
        if n == 0 or self.filter.population.each == 1 or self.engine.meter.allows():
            return
        rows = self.filter.hurry(n, self.engine.steps)
        self.owners, self.visits = self.owners[rows], ()
        self.noise.keep(rows)

    def _finish(self) -> Steered:
        engine, steps = self.engine, self.engine.steps
        media, scores = engine.judge(self.filter.state["x"], self.owners)
        self.filter.last(scores, steps)
        self._show(steps, scores)
        return engine.finish(
            media, scores, self.owners, self.filter.lineage(self.seeds), self.filter.trace,
            self.filter.order(self.method.choose, scores),
        )  # fmt: skip


__all__ = ["Fk"]
