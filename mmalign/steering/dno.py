r"""DNO: direct optimisation of all noises of a many-step sampler (Tang et al., 2405.18881).

The variables are the initial noise and the noise of every step, :math:`z_{0..T}`; the map to the
picture is the whole stochastic sampler :math:`G`:

.. math:: \max_z\; r(G(z), c) - \gamma\, P(z).

Noise far from what a Gaussian can look like leads to pictures that only the reward likes.  With
:math:`z` cut into :math:`m` blocks of :math:`s = 4^q` numbers, :math:`M_1 = \|\text{mean}\|` over
blocks and :math:`M_2 = \|\text{covariance} - I\|_2`, chances of such a deviation are at most

.. math:: \log p_1 = \min\!\big(-\tfrac{m M_1^2}{2 s}, -\log 2\big), \quad
   \log p_2 = \min\!\big(-\tfrac{m}{2} \big[\sqrt{1 + M_2} - 1 - \sqrt{s / m}\big]_+^2, -\log 2\big)

and :math:`P = -(\log p_1 + \log p_2)`, of the numbers in their order plus the average over random
permutations.  It is flat, :math:`4 \log 2`, where noise is as it should be.  The paper takes 100
permutations each time; ten fresh ones in every iteration cost a tenth and average out over them.

A reward without gradient is served by probes (the paper's hybrid): noises are shaken a little,
:math:`z_i = z + \mu n_i`, and the differences of what comes out,
:math:`\sum_i (r_i - r)(x_i - x)`, stand for the gradient at the clean latents :math:`x`; from there
it is back-propagated through the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from mmalign.protocols import Kernel, Policy, RewardModel, Steered
from mmalign.registry import unknown
from mmalign.runtime.progress import track
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling.fit import fitted
from mmalign.steering.climb import Climb
from mmalign.steering.common import Sampling
from mmalign.steering.engine import Engine, Watch, scored
from mmalign.steering.fk import chosen_kernel
from mmalign.steering.gradient import (
    Ascent,
    batches,
    clipped,
    per_row,
    reward_gradient,
    sample,
    sampler_gradient,
)
from mmalign.steering.particles import Noise

Gradient = Literal["auto", "exact", "probes"]


@dataclass(frozen=True, kw_only=True)
class Dno(Sampling):
    """Optimise the noises of every step, of each prompt.

    Args:
        iterations: pictures made of each prompt, the first one of the noises as drawn; a budget
            may allow fewer.
        rate: of AdamW.
        clip: longest gradient of all noises of a prompt together.
        penalty: gamma, weight of the concentration penalty; 0 is none.
        block: ``q``; blocks hold ``4^q`` numbers.
        permutations: random ones of each iteration's penalty.
        kernel, kernel_options: of the steps, as in :class:`~mmalign.steering.fk.Fk`.
        gradient: ``exact``; ``probes`` for a reward that has none; ``auto`` takes what there is.
        probes: samples for one such gradient, each made with all its steps.
        shake: mu, how far a probe is from the noises.
        patience, target: a prompt ends after this many iterations without a better picture, or at
            this score.

    Raises:
        ValueError: an option out of range.
    """

    method: ClassVar[str] = "dno"

    batch_size: int = 8
    iterations: int = 100
    rate: float = 0.01
    clip: float = 1.0
    penalty: float = 1.0
    block: int = 3
    permutations: int = 10
    kernel: str | Kernel | None = None
    kernel_options: Mapping[str, Any] = field(default_factory=dict)
    gradient: Gradient = "auto"
    probes: int = 16
    shake: float = 0.01
    patience: int | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        self.check(iterations=1, block=1, permutations=0, probes=2, patience=1)
        if self.gradient not in get_args(Gradient):
            raise unknown("dno gradient", self.gradient, get_args(Gradient))
        for name in ("rate", "clip", "shake"):
            if not getattr(self, name) > 0:
                raise ValueError(f"dno: {name} must be above 0, got {getattr(self, name)}")
        if not self.penalty >= 0:
            raise ValueError(f"dno: penalty must be a number from 0, got {self.penalty}")

    def run(
        self, policy: Policy, reward: RewardModel, prompts: Sequence[str], *, budget: Any = None,
        watch: Watch | None = None,
    ) -> Steered:  # fmt: skip
        """Steer one sample per prompt.

        Raises:
            ValueError: ``exact`` with a reward that has no gradient, a kernel without noise or for
                another kind of model, or as :class:`~mmalign.steering.engine.Engine` says; or a
                first sample that could not be scored. BudgetError: the budget does not allow one.
        """
        exact = self.gradient == "exact" or (self.gradient == "auto" and reward.info.differentiable)
        kernel = chosen_kernel(self.kernel, self.kernel_options, policy.parameterisation)
        kernel = fitted(kernel, policy)
        engine = self.engine(policy, reward, prompts, budget, watch, gradient=exact)
        runs = 1 if exact else 1 + self.probes
        cost = {"nfe": engine.steps * engine.evaluations, "reward_calls": 1, "decodes": 1}
        iterations = engine.afford(
            self.iterations, "iteration", **{name: unit * runs for name, unit in cost.items()}
        )
        seeds = engine.seeds(engine.owners(1), seed=self.seed)
        climb = Climb(engine, seeds, iterations)
        self._climb(engine, climb, kernel, exact, iterations)
        return climb.finish()

    def _climb(
        self, engine: Engine, climb: Climb, kernel: Kernel, exact: bool, iterations: int
    ) -> None:
        noises = drawn(engine, climb.seeds)
        adam = Adam(noises, self.rate)
        with track("iterations", iterations, enabled=engine.watch is None) as advance:
            for iteration in range(iterations):
                live = climb.live(self.patience, self.target)
                if not len(live) or (iteration and not engine.meter.allows()):
                    break
                judge = reward_gradient
                if not exact:
                    judge = partial(self._probed, noises, kernel, iteration)
                found = sampler_gradient(engine, noises[live], live, kernel, judge)
                orders = self._orders(noises[0].numel(), iteration)
                penalty, push = concentration(noises[live], 4**self.block, orders)
                climb.see(iteration, found, live, penalty=penalty)
                total = found.gradient - self.penalty * push
                noises[live] = adam.step(noises[live], clipped(total, self.clip), live)
                advance(1, f"best {float(climb.best.mean()):.3f}")

    def _orders(self, count: int, iteration: int) -> list[Tensor]:
        """Random permutations of an iteration, the same for every prompt."""
        seed = stable_seed(self.method, "orders", self.seed, iteration)
        generator = torch.Generator().manual_seed(seed)
        if not self.penalty:
            return []
        return [torch.randperm(count, generator=generator) for _ in range(self.permutations)]

    def _probed(
        self, noises: Tensor, kernel: Kernel, iteration: int, engine: Engine, latents: Tensor,
        owners: Tensor,
    ) -> Ascent:  # fmt: skip
        """Scores at clean latents, and a gradient there made of probes."""
        with torch.no_grad():
            media = engine.decode(latents)
            scores = engine.score(media, owners).to("cpu")
            many = owners.repeat_interleave(self.probes)
            seeds = engine.seeds(many, "probes", iteration, seed=self.seed)
            around = noises[owners].repeat_interleave(self.probes, 0)
            around = around + self.shake * Noise(seeds).draw(around)
            parts, found = [], []
            for rows in batches(len(many), engine.batch_size):
                parts.append(sample(engine, around[rows], many[rows], kernel))
                found.append(engine.score(engine.decode(parts[-1]), many[rows]))
        values = torch.cat([torch.where(scored(s), s.value, torch.nan).cpu() for s in found])
        moves = torch.cat(parts).view(len(latents), self.probes, *latents.shape[1:])
        gradient = weighted_differences(
            moves - latents.unsqueeze(1), values.view(len(latents), -1) - scores.value.view(-1, 1)
        )
        return Ascent(media, scores, gradient)


def drawn(engine: Engine, seeds: Sequence[int]) -> Tensor:
    """The noises of the sampler, ``(B, steps + 1, ...)`` fp32: the initial one and each step's."""
    start = engine.policy.init_noise(seeds).float()
    return torch.cat([start.unsqueeze(1), Noise(seeds).draw(start, engine.steps)], 1)


def weighted_differences(moves: Tensor, gains: Tensor) -> Tensor:
    """Gradient at ``B`` points of which ``moves`` ``(B, n, ...)`` away ``gains`` ``(B, n)`` arise.

    ``mean_i(gain_i move_i) / v`` with ``v`` the mean square of the moves' elements: unbiased for
    a linear reward and moves that are as long in all directions. Moves whose gain is not a number
    do not count.
    """
    good = torch.isfinite(gains)
    gains = torch.where(good, gains, 0.0).to(moves.device)
    flat = moves.flatten(2) * good.to(moves.device).unsqueeze(-1)
    mean = torch.einsum("bn,bnd->bd", gains, flat)
    spread = flat.square().sum(1).mean(1, keepdim=True)
    return (mean / spread.clamp(min=1e-20)).view_as(moves[:, 0])


def concentration(
    noises: Tensor, block: int, orders: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Penalty ``P`` of each row ``(B,)`` and its gradient ``(B, ...)``.

    Args:
        block: ``s``; numbers beyond the last whole block are left out (of each order others).
        orders: permutations of a row's numbers; without them only the order as it is counts.
    """
    flat = noises.detach().flatten(1)
    total, gradient = torch.zeros(len(flat)), torch.zeros_like(flat)
    for order in (None, *orders):
        leaf = flat.clone().requires_grad_(True)
        weight = 1.0 if order is None else 1.0 / len(orders)
        with torch.enable_grad():
            taken = leaf if order is None else leaf[:, order.to(leaf.device)]
            value = weight * -_log_chances(taken, block)
        gradient += torch.autograd.grad(value.sum(), leaf)[0]
        total += value.detach().cpu()
    return total, gradient.view_as(noises)


def _log_chances(numbers: Tensor, block: int) -> Tensor:
    """``log p1 + log p2`` of rows ``(B, D)``."""
    blocks = numbers.shape[1] // block
    if blocks < 1:
        raise ValueError(
            f"dno: {numbers.shape[1]} noises do not fill one block of {block}; lower block"
        )
    rows = numbers[:, : blocks * block].view(len(numbers), blocks, block)
    shift = rows.mean(1).square().sum(1)
    covariance = rows.transpose(1, 2) @ rows / blocks
    unit = torch.eye(block, device=rows.device, dtype=rows.dtype)
    widest = torch.linalg.eigvalsh(covariance - unit).abs().amax(1)
    excess = ((1 + widest).sqrt() - 1 - math.sqrt(block / blocks)).clamp(min=0)
    floor = -math.log(2)
    first = (-blocks * shift / (2 * block)).clamp(max=floor)
    return first + (-blocks * excess.square() / 2).clamp(max=floor)


class Adam:
    """AdamW that climbs, with a count of steps for each row."""

    def __init__(self, like: Tensor, rate: float, decay: float = 0.01) -> None:
        self.rate, self.decay = rate, decay
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)
        self.count = torch.zeros(len(like), device=like.device)

    def step(self, x: Tensor, gradient: Tensor, rows: Tensor) -> Tensor:
        """``x`` of ``rows`` after one step up."""
        b1, b2 = 0.9, 0.999
        self.count[rows] += 1
        self.first[rows] = b1 * self.first[rows] + (1 - b1) * gradient
        self.second[rows] = b2 * self.second[rows] + (1 - b2) * gradient.square()
        count = self.count[rows]
        first = self.first[rows] / per_row(1 - b1**count, x)
        second = self.second[rows] / per_row(1 - b2**count, x)
        return x * (1 - self.rate * self.decay) + self.rate * first / (second.sqrt() + 1e-8)


__all__ = ["Adam", "Dno", "concentration", "drawn", "weighted_differences"]
