r"""Search over paths: trajectories branch on the way and the best go on (Ma et al., 2501.09732).

``width`` trajectories of a prompt start from independent noises and follow the deterministic
sampler. At the steps between ``start`` and ``stop`` that ``every`` selects, a stochastic kernel
draws ``branch`` next states of each,

.. math:: x^{(i,j)}_{k+1} \sim p(\cdot \mid x^{(i)}_k), \qquad
   v^{(i,j)} = r\big(D(\hat x_0(x^{(i,j)}_{k+1}))\big)

and the ``width`` states of highest value among all of them go on. Values are taken at the new
state: its prediction is the one the next step needs, so it is paid for only where a branch dies.
The paper adds noise back and integrates again; a stochastic kernel draws from the same
conditional law in one step and cannot leave the schedule.

It is a greedy beam: it maximises and does not sample, unlike Feynman-Kac steering.
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
from mmalign.sampling.kernels import build_kernel
from mmalign.steering.common import Pool, Sampling, values_of
from mmalign.steering.engine import Engine, Watch, scored
from mmalign.types import Score


@dataclass(frozen=True, kw_only=True)
class PathSearch(Sampling):
    """Beam search over branching trajectories.

    Args:
        width: trajectories that go on.
        branch: next states drawn of each where it branches.
        start, stop: shares of the steps between which trajectories branch; clean estimates of
            the first steps say little, and those of the last change nothing.
        every: steps from one branching to the next.
        kernel: stochastic kernel of the branching steps; ``None`` takes ``cps`` for flow models
            and ``ddim`` with full noise for diffusion models.
        kernel_options: the kernel's own, as ``{"noise_level": 0.7}``.

    Raises:
        ValueError: an option out of range.
    """

    method: ClassVar[str] = "path_search"

    width: int = 2
    branch: int = 4
    start: float = 0.2
    stop: float = 0.8
    every: int = 2
    kernel: str | None = None
    kernel_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check(width=1, branch=1, every=1)
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(
                "path_search: start and stop must be shares of the steps, 0 <= start <= stop <= 1, "
                f"got {self.start} and {self.stop}"
            )

    @torch.no_grad()
    def run(
        self, policy: Policy, reward: RewardModel, prompts: Sequence[str], *, budget: Any = None,
        watch: Watch | None = None,
    ) -> Steered:  # fmt: skip
        """Steer one sample per prompt.

        A budget of counts first thins out the branchings, then narrows the beam. When time is up
        the best trajectory of each prompt is finished without branching.

        Raises:
            ValueError: a deterministic kernel, or as :class:`~mmalign.steering.engine.Engine`
                says. BudgetError: the budget does not allow one trajectory.
        """
        kernel = branching_kernel(policy, self.kernel, self.kernel_options)
        engine = self.engine(policy, reward, prompts, budget, watch)
        width, visits = self._affordable(engine)
        beam = _Beam(engine, width, self.branch, self.seed)
        with track("steps", engine.steps, enabled=watch is None) as advance:
            for step in range(engine.steps):
                if not engine.meter.allows():
                    beam.keep_best()
                    visits = []
                if step in visits:
                    beam.fork(step, kernel)
                else:
                    beam.move(step)
                beam.show(step + 1)
                advance(1)
        return beam.finish()

    def visits(self, steps: int) -> list[int]:
        """Steps at which trajectories branch; never the last, whose next state is the sample."""
        first, last = round(self.start * steps), min(round(self.stop * steps), steps - 1)
        return list(range(first, last, self.every))

    def _affordable(self, engine: Engine) -> tuple[int, list[int]]:
        """The widest beam, and then the most branchings, that the budget allows."""
        every = self.visits(engine.steps)
        for width in range(self.width, 0, -1):
            for count in range(len(every), min(len(every), 1) - 1, -1):
                if engine.meter.most(**self._cost(engine, width, count)) >= 1:
                    return width, _thinned(every, count)
        return engine.afford(1, "trajectory", **self._cost(engine, 1, 0)), []

    def _cost(self, engine: Engine, width: int, visits: int) -> dict[str, int]:
        states = visits * width * self.branch
        # The predictions of survivors are the next step's, so only those that die cost extra.
        calls = width * engine.steps + states - visits * width
        pictures = width + states
        return {"nfe": calls * engine.evaluations, "reward_calls": pictures, "decodes": pictures}


class _Beam:
    """The trajectories of all prompts, best first within a prompt once they have branched."""

    def __init__(self, engine: Engine, width: int, branch: int, seed: int) -> None:
        self.engine, self.width, self.branch, self.seed = engine, width, branch, seed
        self.owners = engine.owners(width)
        self.roots = engine.seeds(self.owners, seed=seed)
        self.x = engine.policy.init_noise(self.roots)
        self.sigmas = engine.sigmas()
        self.ready: Tensor | None = None  # predictions at the current states
        self.paths: list[list[list[int]]] = [[] for _ in self.roots]  # [step, seed] pairs
        self.trace: list[dict[str, Any]] = []
        self.best = torch.full((len(engine.prompts),), torch.nan)

    def move(self, step: int) -> None:
        """One deterministic step of every trajectory."""
        kernel = deterministic(self.engine.policy.parameterisation)
        at, after = self.sigmas[step], self.sigmas[step + 1]
        self.x = kernel.step(self.x, at, after, self._prediction(step)).x_next

    def fork(self, step: int, kernel: Kernel) -> None:
        """Branch, judge the branches by their clean estimates, keep the best."""
        engine, sigma = self.engine, self.sigmas[step + 1]
        rows = torch.arange(len(self.x)).repeat_interleave(self.branch)
        owners = self.owners[rows]
        seeds = engine.seeds(owners, step, seed=self.seed)
        noise = engine.policy.init_noise(seeds)
        prediction = self._prediction(step)[rows]
        states = kernel.step(self.x[rows], self.sigmas[step], sigma, prediction, noise).x_next
        ready = engine.predict(states, sigma, owners)
        clean, _ = engine.estimate(states, sigma, ready)
        scores = engine.judge(clean, owners)[1].to("cpu")
        kept = self._kept(owners, scores)
        self._record(step, owners, rows, scores, kept)
        self.x, self.ready, self.owners = states[kept], ready[kept], owners[kept]
        old = rows[kept].tolist()
        self.roots = [self.roots[i] for i in old]
        self.paths = [
            [*self.paths[i], [step, seeds[j]]] for i, j in zip(old, kept.tolist(), strict=True)
        ]

    def keep_best(self) -> None:
        """One trajectory a prompt: the best of the last branching, else the first."""
        first = [int(torch.nonzero(self.owners == p)[0]) for p in self.owners.unique().tolist()]
        self.ready = None if self.ready is None else self.ready[first]
        self.x, self.owners = self.x[first], self.owners[first]
        self.roots, self.paths = [self.roots[i] for i in first], [self.paths[i] for i in first]

    def show(self, done: int) -> None:
        """Tell whoever watches."""
        self.engine.show(done, self.engine.steps, self.best)

    def finish(self) -> Steered:
        """Score the finished samples exactly."""
        pool = Pool(self.engine, len(self.x))
        size = self.engine.batch_size
        lines: list[dict[str, Any]] = [
            {"seed": seed, "branches": path}
            for seed, path in zip(self.roots, self.paths, strict=True)
        ]
        for at in range(0, len(self.x), size):
            rows = slice(at, at + size)
            pool.add(self.x[rows], self.owners[rows], lines[rows])
        return pool.finish(self.trace)

    def _prediction(self, step: int) -> Tensor:
        found, self.ready = self.ready, None
        return (
            self.engine.predict(self.x, self.sigmas[step], self.owners) if found is None else found
        )

    def _kept(self, owners: Tensor, scores: Score) -> Tensor:
        """Rows that go on, best first within each prompt; unscored ones only where none else."""
        values = torch.where(scored(scores), scores.value.detach(), -torch.inf)
        kept = []
        for prompt in owners.unique().tolist():
            rows = torch.nonzero(owners == prompt).flatten()
            best = torch.argsort(values[rows], descending=True, stable=True)
            kept.append(rows[best[: self.width]])
            self.best[prompt] = values[kept[-1][0]]
        return torch.cat(kept)

    def _record(self, step: int, owners: Tensor, rows: Tensor, scores: Score, kept: Tensor) -> None:
        values = values_of(scores)
        for prompt in owners.unique().tolist():
            own = torch.nonzero(owners == prompt).flatten().tolist()
            line = {
                "event": "fork",
                "prompt": prompt,
                "step": step + 1,
                "steps": self.engine.steps,
                "sigma": float(self.sigmas[step + 1]),
                "values": [values[i] for i in own],
                "parents": [int(rows[i] - rows[own[0]]) for i in own],
                "kept": [i - own[0] for i in kept.tolist() if owners[i] == prompt],
            }
            unscored = sum(values[i] is None for i in own)
            if unscored:
                line["note"] = f"{unscored} of {len(own)} branches could not be scored"
            self.trace.append(line)


def branching_kernel(policy: Policy, name: str | None, options: Mapping[str, Any]) -> Kernel:
    """The stochastic kernel by name, or the default of the policy's parameterisation.

    Raises:
        ValueError: it is deterministic, does not fit, or has no such option.
    """
    chosen = name or ("cps" if policy.parameterisation == "flow" else "ddim")
    kernel = build_kernel(chosen, **options)
    if not kernel.stochastic:
        raise ValueError(
            f"path_search: kernel {chosen!r} is deterministic, so all branches would be equal; use "
            "cps or flow_sde for flow models, ddim with eta above 0 for diffusion models"
        )
    return fitted(kernel, policy)


def _thinned(items: Sequence[int], count: int) -> list[int]:
    """``count`` of ``items``, spread over all of them."""
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


__all__ = ["PathSearch", "branching_kernel"]
