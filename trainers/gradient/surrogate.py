r"""A surrogate trajectory: a short differentiable path that ends in the true sample.

The family of DRTune, LeapAlign and FlowBP, for flow models: of the predictions :math:`u_i` of a
rollout those of a few steps :math:`S` are computed again from the states :math:`x_i` they were made
at, and

.. math:: x_0^{sur} = x_T + \sum_i h_i \big(i \in S\ ?\ u_i(\theta) : \mathrm{sg}(u_i)\big)

equals :math:`x_0` whatever :math:`S`, while its gradient has no product of Jacobians. In the terms
of :mod:`mmalign.sampling.chain` the steps outside of :math:`S` have their output detached and those
in :math:`S` their input, which is how it is computed here, for diffusion models as well. A bridge
:math:`\alpha` lets the input of the last step of :math:`S` depend on the earlier ones,

.. math:: x_l \leftarrow \mathrm{sg}(x_l) + \alpha\,(x_l^{sur} - \mathrm{sg}(x_l^{sur})),

so that early steps also learn through what the network makes of them later.

Steps are drawn one from each of ``K`` equal parts of the grid, so each step is taught sooner or
later. Written from the description of the family, not from the code of a paper: how those choose
:math:`S` and :math:`\alpha` may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from random import Random

from mmalign.config import ConfigError
from trainers.gradient.drtune import sparse
from trainers.gradient.objective import Path, RewardGradient, at_most


@dataclass(frozen=True, kw_only=True)
class Surrogate(RewardGradient):
    r"""Reward back-propagation along a surrogate trajectory.

    Attributes:
        train_steps: :math:`K = |S|`.
        bridge: :math:`\alpha` in [0, 1]; 0 leaves the bridge out.
    """

    train_steps: int = 3
    bridge: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.bridge <= 1:
            raise ConfigError(f"objective.bridge is {self.bridge}; it must lie in [0, 1]")
        if self.bridge and self.train_steps < 2:
            raise ConfigError(
                f"objective.bridge is {self.bridge} with objective.train_steps "
                f"{self.train_steps}; a bridge joins two steps: raise train_steps"
            )

    def path(self, steps: int, rng: Random) -> Path:
        """One step of each part of the grid has a gradient; the reward sees the sample."""
        ends = [round(n * steps / self.train_steps) for n in range(self.train_steps + 1)]
        chosen = {rng.randrange(a, b) for a, b in pairwise(ends)}
        return Path(sparse(steps, chosen, self.bridge))

    def check_steps(self, steps: int) -> None:
        """Refuse more steps than there are."""
        at_most(steps, train_steps=self.train_steps)
