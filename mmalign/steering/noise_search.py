r"""Search over noise: random, zero-order and over paths (Ma et al., 2501.09732).

* **Random search** draws rounds of :math:`2, 4, 8, \dots` independent noises and keeps the best
  sample. It is best of N with a way to stop early.
* **Zero-order search** walks on the sphere. From the pivot :math:`z` it tries :math:`M` neighbours

  .. math:: z' = \rho\, z + \sqrt{1 - \rho^2}\, \|z\| \frac{n_\perp}{\|n_\perp\|}, \qquad
     n_\perp = n - \frac{n \cdot z}{z \cdot z} z, \quad n \sim N(0, I)

  so that :math:`\|z'\| = \|z\|` and the cosine between them is exactly :math:`\rho`; the best
  neighbour becomes the pivot, only where it improves on it.
* **Search over paths** keeps ``width`` trajectories. At some steps each of them branches: a
  stochastic kernel draws ``branch`` next states, the reward judges their clean estimates, and the
  best ``width`` of all go on. All other steps are deterministic.

All three see scores only. The score of the chosen sample is a maximum over everything tried, so
it is biased upwards: judge results with another reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmalign.protocols import Policy, RewardModel, Steered
from mmalign.runtime.progress import track
from mmalign.steering.common import Pool, Sampling, values_of
from mmalign.steering.engine import Engine, Watch
from mmalign.types import Score


@dataclass(frozen=True, kw_only=True)
class RandomSearch(Sampling):
    """Rounds of 2, 4, 8, ... noises; the best sample of all rounds is kept.

    The noises of more rounds contain those of fewer, and all are those of best of N.

    Args:
        rounds: how many; four take 30 samples a prompt.
        target: a prompt whose best score has reached this takes part in no further round.

    Raises:
        ValueError: an option out of range.
    """

    method: ClassVar[str] = "random_search"

    rounds: int = 4
    target: float | None = None

    def __post_init__(self) -> None:
        self.check(rounds=1)

    @torch.no_grad()
    def run(
        self, policy: Policy, reward: RewardModel, prompts: Sequence[str], *, budget: Any = None,
        watch: Watch | None = None,
    ) -> Steered:  # fmt: skip
        """Steer one sample per prompt; a budget may end the search within a round.

        Raises:
            ValueError: as :class:`~mmalign.steering.engine.Engine` says. BudgetError: the budget
                does not allow one sample.
        """
        engine = self.engine(policy, reward, prompts, budget, watch)
        sizes = [2**i for i in range(1, self.rounds + 1)]
        left = engine.afford(sum(sizes), "sample", **_sample_cost(engine))
        pool, trace = Pool(engine, left * len(engine.prompts)), []
        with track("noises", pool.planned, enabled=watch is None) as advance:
            for number, size in enumerate(sizes):
                live = self._live(pool)
                size, before = min(size, left), len(pool)
                if not (size and len(live)) or (number and not engine.meter.allows()):
                    break
                owners = live.repeat(size)  # a time limit then leaves every prompt some
                trace += self._round(engine, pool, owners, number)
                left -= size
                advance(len(pool) - before, f"best {float(pool.best.mean()):.3f}")
        return pool.finish(trace)

    def _live(self, pool: Pool) -> Tensor:
        target = math.inf if self.target is None else self.target
        return torch.nonzero(pool.best < target).flatten()

    def _round(self, engine: Engine, pool: Pool, owners: Tensor, number: int) -> list[Any]:
        # Whoever is still in has been in every round before.
        done = pool.counts[int(owners[0])]
        seeds = engine.seeds(owners, seed=self.seed, first=done)
        lines = [{"seed": seed, "round": number} for seed in seeds]
        scores, _ = pool.sample(engine.policy.init_noise(seeds), owners, lines)
        owners = owners[: len(scores)]
        return [
            {
                "event": "round",
                "prompt": prompt,
                "round": number,
                "values": values_of(scores[owners == prompt]),
                "best": _finite(pool.best[prompt]),
            }
            for prompt in owners.unique().tolist()
        ]


@dataclass(frozen=True, kw_only=True)
class ZeroOrder(Sampling):
    """Walk over the sphere of noises, from the best of a few to ever better neighbours.

    Args:
        neighbours: tried around the pivot in each iteration, ``M``.
        cosine: between a neighbour and the pivot, ``rho``: nearer to 1 looks closer by.
        iterations: of the walk; a budget may allow fewer.
        start: independent noises, the best of which is the first pivot.

    Raises:
        ValueError: an option out of range.
    """

    method: ClassVar[str] = "zero_order"

    neighbours: int = 4
    cosine: float = 0.95
    iterations: int = 8
    start: int = 1

    def __post_init__(self) -> None:
        self.check(neighbours=1, iterations=0, start=1)
        if not 0 <= self.cosine < 1:
            raise ValueError(f"zero_order: cosine must lie in [0, 1), got {self.cosine}")

    @torch.no_grad()
    def run(
        self, policy: Policy, reward: RewardModel, prompts: Sequence[str], *, budget: Any = None,
        watch: Watch | None = None,
    ) -> Steered:  # fmt: skip
        """Steer one sample per prompt; the best score never falls from one iteration to the next.

        ``lineage`` holds of each sample the seed of its own noise, its iteration and its
        ``parent``, a number among the prompt's samples; :func:`noise_of` makes its noise of them.

        Raises:
            ValueError: as :class:`~mmalign.steering.engine.Engine` says. BudgetError: the budget
                does not allow one sample.
        """
        engine = self.engine(policy, reward, prompts, budget, watch)
        wanted = self.start + self.iterations * self.neighbours
        left = engine.afford(wanted, "sample", **_sample_cost(engine))
        pool, trace = Pool(engine, left * len(engine.prompts)), []
        walk = _Walk(engine, pool, self.cosine, self.seed)
        with track("noises", pool.planned, enabled=watch is None) as advance:
            for iteration in range(self.iterations + 1):
                size = min(self.neighbours if iteration else self.start, left)
                if not size or (iteration and not engine.meter.allows()):
                    break
                before = len(pool)
                trace += walk.look_around(iteration, size)
                left -= size
                advance(len(pool) - before, f"best {float(pool.best.mean()):.3f}")
        return pool.finish(trace)


class _Walk:
    """Pivots of all prompts, and how they move."""

    def __init__(self, engine: Engine, pool: Pool, cosine: float, seed: int) -> None:
        self.engine, self.pool, self.cosine, self.seed = engine, pool, cosine, seed
        self.values = torch.full((len(engine.prompts),), -torch.inf)
        self.numbers: list[int | None] = [None] * len(engine.prompts)
        self.pivots: Tensor | None = None

    def look_around(self, iteration: int, size: int) -> list[dict[str, Any]]:
        """Sample ``size`` noises of every prompt and move to the best; one record a prompt."""
        owners = torch.arange(len(self.values)).repeat(size)
        seeds = self.engine.seeds(owners, *([iteration] if iteration else []), seed=self.seed)
        noise = self.engine.policy.init_noise(seeds)
        if self.pivots is not None:
            noise = neighbours(self.pivots[owners], noise, self.cosine)
        parents = [self.numbers[i] for i in owners.tolist()]
        lines = [
            {"seed": seed, "iteration": iteration, "parent": parent}
            for seed, parent in zip(seeds, parents, strict=True)
        ]
        scores, numbers = self.pool.sample(noise, owners, lines)
        if self.pivots is None:
            self.pivots = noise[: len(self.values)].clone()
            self.numbers = [0] * len(self.values)
        owners = owners[: len(scores)]
        return [
            self._move(prompt, iteration, owners == prompt, scores, numbers, noise)
            for prompt in owners.unique().tolist()
        ]

    def _move(
        self, prompt: int, iteration: int, mine: Tensor, scores: Score, numbers: list[int],
        noise: Tensor,
    ) -> dict[str, Any]:  # fmt: skip
        rows = torch.nonzero(mine).flatten()
        found = values_of(scores[rows])
        ranked = [-math.inf if v is None else v for v in found]
        best = max(range(len(ranked)), key=ranked.__getitem__)  # a tie stays with the earlier one
        moved = ranked[best] > float(self.values[prompt])
        if moved:
            row = int(rows[best])
            self.values[prompt] = ranked[best]
            self.numbers[prompt] = numbers[row]
            assert self.pivots is not None
            self.pivots[prompt] = noise[row]
        return {
            "event": "look",
            "prompt": prompt,
            "iteration": iteration,
            "values": found,
            "moved": moved,
            "best": _finite(self.values[prompt]),
        }


def neighbours(pivot: Tensor, noise: Tensor, cosine: float) -> Tensor:
    """Points at ``cosine`` from ``pivot`` ``(B, ...)``, of its norm, where ``noise`` points.

    Whatever of ``noise`` lies along the pivot is taken out first, so norm and cosine are exact.
    """
    z, n = pivot.flatten(1), noise.flatten(1)
    side = n - (n * z).sum(1, keepdim=True) / z.square().sum(1, keepdim=True) * z
    side = side * (z.norm(dim=1, keepdim=True) / side.norm(dim=1, keepdim=True))
    return (cosine * z + math.sqrt(1 - cosine**2) * side).view_as(pivot)


def noise_of(
    policy: Policy, lineage: Sequence[Mapping[str, Any]], row: int, cosine: float
) -> Tensor:
    """The initial noise ``(1, ...)`` of candidate ``row`` of a zero-order search, made again.

    Args:
        lineage: of the whole result.
        cosine: the search's.
    """
    own = [i for i, line in enumerate(lineage) if line["prompt"] == lineage[row]["prompt"]]
    chain = [row]
    while lineage[chain[-1]]["parent"] is not None:
        chain.append(own[lineage[chain[-1]]["parent"]])
    noise, *rest = (policy.init_noise([lineage[i]["seed"]]) for i in reversed(chain))
    for step in rest:
        noise = neighbours(noise, step, cosine)
    return noise


def _sample_cost(engine: Engine) -> dict[str, int]:
    return {"nfe": engine.steps * engine.evaluations, "reward_calls": 1, "decodes": 1}


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None


__all__ = ["RandomSearch", "ZeroOrder", "neighbours", "noise_of"]
