r"""SVDD: soft value-based decoding (Li et al., 2408.08252).

At each step a sample draws ``M`` children from the stochastic kernel and goes on with one of them,
picked with probability

.. math:: \mathrm{softmax}_j\big( v(x'_j) / \alpha \big), \qquad v(x') = r(\hat x_0(x'))

or with the best one for :math:`\alpha = 0`.  Samples do not interact.  With
:math:`v(x') = \alpha \log E[e^{r(x_0) / \alpha} | x']` and many children the samples follow
:math:`p(x_0)\, e^{r(x_0) / \alpha}`; the reward of the clean estimate is the usual stand-in for it.

The network call that values a child is the next step's prediction, so a step costs ``M`` calls and
not ``M + 1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmalign.protocols import Kernel, Policy, RewardModel, Steered
from mmalign.runtime.progress import track
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling.fit import fitted
from mmalign.steering.common import Sampling
from mmalign.steering.engine import Engine, Watch, scored
from mmalign.steering.feynman_kac import visited
from mmalign.steering.fk import FLOW, Decoder, chosen_kernel, last_kernel
from mmalign.steering.particles import Noise
from mmalign.types import Score

Value = Callable[[Tensor, Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Svdd(Sampling):
    """Let each sample pick among ``children`` at every step.

    Args:
        n: samples a prompt, the best of which is chosen at the end.
        children: ``M``; a budget may allow fewer. 1 is plain stochastic sampling.
        alpha: the temperature; 0 takes the best child, as the released code does.
        start, stop, every: the steps with children, as shares of the steps (``0.2``) or step
            numbers; by default all but the last.
        value: ``(latents, sigma, prompts) -> (B,)`` in place of the reward of the clean estimate,
            for a learned value of noisy states.
        kernel, kernel_options, decoder: as of :class:`~mmalign.steering.fk.Fk`.
        seed, batch_size, steps, guidance_scale, dtype: as for every method.

    Raises:
        ValueError: an option out of range, or a deterministic kernel.
    """

    method: ClassVar[str] = "svdd"

    n: int = 1
    children: int = 20
    alpha: float = 0.0
    start: int | float = 1
    stop: int | float = 1.0
    every: int | float = 1
    value: Value | None = None
    kernel: str | Kernel | None = None
    kernel_options: Mapping[str, Any] = field(default_factory=dict)
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        self.check(n=1, children=1)
        if not self.alpha >= 0:
            raise ValueError(
                f"svdd: alpha must be 0 (the best child) or above, got {self.alpha}; to steer away "
                "from what a reward likes, give the reward a negative weight"
            )
        visited(10, self.start, self.stop, self.every)
        if self.kernel is not None:
            chosen_kernel(self.kernel, self.kernel_options, "")

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
        """Steer ``n`` samples a prompt and choose the best.

        A budget of evaluations, pictures or decodes lowers the number of children, then of
        samples; when the time is over, samples go on without children.

        Raises:
            ValueError: as the engine's, or a kernel that does not fit the policy. BudgetError: not
                even one sample is allowed.
        """
        kernel = chosen_kernel(self.kernel, self.kernel_options, policy.parameterisation, FLOW)
        kernel = fitted(kernel, policy)
        engine = self.engine(policy, reward, prompts, budget, watch)
        return _Run(self, engine, kernel).result()

    def affordable(self, engine: Engine) -> tuple[int, int]:
        """Samples a prompt, and children, that the budget allows."""
        visits = len(visited(engine.steps, self.start, self.stop, self.every))

        def cost(children: int) -> dict[str, int]:
            met = 0 if children == 1 else visits * children
            calls = engine.steps if children == 1 else engine.steps - visits + met
            pictures = 1 if self.value is not None else 1 + met
            nfe = calls * engine.evaluations
            return {"nfe": nfe, "reward_calls": pictures, "decodes": pictures}

        fits = (m for m in range(self.children, 1, -1) if engine.meter.most(**cost(m)) >= self.n)
        children = next(fits, 1)
        return engine.afford(self.n, "sample", **cost(children)), children


class _Run:
    """One run of the method: the loop over the sampler's steps."""

    def __init__(self, method: Svdd, engine: Engine, kernel: Kernel) -> None:
        self.method, self.engine, self.kernel = method, engine, kernel
        self.n, self.children = method.affordable(engine)
        self.visits = visited(engine.steps, method.start, method.stop, method.every)
        self.owners = engine.owners(self.n)
        self.seeds = engine.seeds(self.owners, seed=method.seed)
        self.noise = Noise(self.seeds)
        self.choice = [
            torch.Generator().manual_seed(stable_seed("choice", seed)) for seed in self.seeds
        ]
        self.trace: list[dict[str, Any]] = []

    def result(self) -> Steered:
        """From the first step to the chosen pictures."""
        engine, sigmas = self.engine, self.engine.sigmas()
        x = engine.policy.init_noise(self.seeds)
        prediction = engine.predict(x, sigmas[0], self.owners)
        with track("steps", engine.steps, enabled=engine.watch is None) as advance:
            for n in range(engine.steps - 1):
                met = self._met(n + 1)
                owners = self.owners.repeat_interleave(met)
                x = self._step(n, x, prediction, sigmas, met)
                prediction = engine.predict(x, sigmas[n + 1], owners)
                if met > 1:
                    rows = self._pick(n + 1, x, prediction, sigmas[n + 1], owners)
                    x, prediction = x[rows], prediction[rows]
                advance(1)
            x = self._step(engine.steps - 1, x, prediction, sigmas, 1)
            advance(1)
        media, scores = engine.judge(x, self.owners)
        self._show(engine.steps, scores.value)
        lineage = [{"seed": seed} for seed in self.seeds]
        return engine.finish(media, scores, self.owners, lineage, self.trace)

    def _met(self, step: int) -> int:
        """How many children are made on the way to ``step``."""
        if step > 1 and not self.engine.meter.allows():
            self.visits = ()
        return self.children if step in self.visits else 1

    def _step(self, n: int, x: Tensor, prediction: Tensor, sigmas: Tensor, met: int) -> Tensor:
        """``met`` children of each row: ``(B * met, ...)``, grouped by parent."""
        kernel = self.kernel
        if n == self.engine.steps - 1:
            kernel = last_kernel(kernel, self.engine.policy.parameterisation)
        noise = self.noise.draw(x, each=met).flatten(0, 1)
        x, prediction = (t.repeat_interleave(met, 0) for t in (x, prediction))
        return kernel.step(x, sigmas[n], sigmas[n + 1], prediction, noise).x_next

    def _pick(
        self, step: int, x: Tensor, prediction: Tensor, sigma: Tensor, owners: Tensor
    ) -> Tensor:
        """The row of the child that each parent goes on with."""
        scores = self._values(x, prediction, sigma, owners)
        values = torch.where(scored(scores), scores.value.double(), -torch.inf).cpu()
        values = values.view(len(self.owners), -1)
        self._show(step, values.amax(1))
        picked = pick(values, self.method.alpha, self.choice)
        self._record(step, values, picked, scores.notes)
        return torch.arange(len(values)) * values.shape[1] + picked

    def _values(self, x: Tensor, prediction: Tensor, sigma: Tensor, owners: Tensor) -> Score:
        engine = self.engine
        if self.method.value is not None:
            return Score.of(self.method.value(x, sigma, engine.texts(owners)).detach())
        clean, _ = engine.estimate(x, sigma, prediction)
        return engine.judge(clean, owners, self.method.decoder)[1]

    def _record(self, step: int, values: Tensor, picked: Tensor, notes: Sequence[str]) -> None:
        numbers = [[v if math.isfinite(v) else None for v in row] for row in values.tolist()]
        met = values.shape[1]
        for prompt in range(len(self.engine.prompts)):
            rows = slice(prompt * self.n, (prompt + 1) * self.n)
            said = notes[prompt * self.n * met : (prompt + 1) * self.n * met]
            record = {
                "event": "pick", "prompt": prompt, "step": step, "steps": self.engine.steps,
                "values": numbers[rows], "picked": picked[rows].tolist(),
            }  # fmt: skip
            if any(said):
                record["notes"] = list(dict.fromkeys(filter(None, said)))
            self.trace.append(record)

    def _show(self, step: int, values: Tensor) -> None:
        values = values.detach().cpu().view(len(self.engine.prompts), -1)
        values = torch.where(torch.isfinite(values), values, -torch.inf)
        best = values.amax(1)
        shown = torch.where(torch.isfinite(best), best, torch.nan)
        self.engine.show(step, self.engine.steps, shown)


def pick(values: Tensor, alpha: float, generators: Sequence[torch.Generator]) -> Tensor:
    """One child of each parent by ``softmax(values / alpha)``: ``(B,)`` int64 of ``(B, M)``.

    ``alpha = 0`` takes the first of the best. Children at ``-inf`` are never taken while there is
    another.
    """
    if alpha == 0:
        return values.argmax(1)
    alive = torch.isfinite(values)
    logits = torch.where(alive, values / alpha, -torch.inf)
    uniform = torch.stack(
        [torch.rand(values.shape[1], generator=g, dtype=torch.float64) for g in generators]
    )
    # The largest of logits plus Gumbel noise is a draw from their softmax.
    return (logits - (-uniform.clamp(min=1e-300).log()).log()).argmax(1)


__all__ = ["Svdd"]
