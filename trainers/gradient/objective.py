r"""What all reward-gradient objectives share: the loss, and how a path through the sampler is told.

.. math:: L = -w\,\phi\big(r(\mathrm{decode}(x_0), c)\big)
              + \beta\,\mathrm{mean}_i\,\mathrm{mean}_D (f_\theta(x_i) - f_{ref}(x_i))^2

with :math:`\phi(r) = r`, or :math:`-\max(0, m - r)`, flat above the margin ``m``. An objective of
this kind is nothing but a schedule of switches (:mod:`mmalign.sampling.chain`): which steps of the
sampler run, which of them have a gradient, and what the reward sees. The sum over ``i`` is over the
steps that teach the weights, at states held constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmalign.config import ConfigError
from mmalign.sampling.chain import Sees, Switch, Unconditional
from mmalign.sampling.decoding import Clamp
from trainers.objective import Process

Memory = Literal["checkpoint", "adjoint", "store"]


@dataclass(frozen=True)
class Path:
    """How one step of training goes through the sampler; the same for all its samples.

    Attributes:
        switches: of the steps ``start, start + 1, ...`` of the grid; no step follows the last.
        start: the first step; with ``renoise`` from clean latents noised to its level.
        sees: the reward sees the last state, or the last step's clean estimate.
        copies: further clean estimates that the reward sees: the sample, held constant, noised
            back to the last level and denoised again.
    """

    switches: tuple[Switch, ...]
    start: int = 0
    renoise: bool = False
    sees: Sees = "final"
    copies: int = 0

    @property
    def first(self) -> int:
        """The first step of the grid that teaches the weights."""
        return self.start + [s.teaches for s in self.switches].index(True)


def tail(steps: int, first: int) -> tuple[Switch, ...]:
    """``steps`` switches with a gradient from step ``first`` on."""
    return (Switch(no_grad=True),) * first + (Switch(),) * (steps - first)


@dataclass(frozen=True, kw_only=True)
class RewardGradient:
    """Base of the family: implement :meth:`path`.

    One may also have ``kernel(seeds)``, steps of its own in the place of the recipe's, and
    ``judged(policy, reward, clean, prompts)``, a loss of its own at clean latents, with
    ``check_whole(reward)`` to refuse a reward; see :mod:`trainers.few_step.r0`.

    Attributes:
        weight: :math:`w`; the optimiser's own scale makes it matter only beside ``kl_beta`` and
            ``optim.grad_clip``.
        margin: :math:`m`; a sample whose reward is above it has no gradient.
        clamp: how pictures are brought to [0, 1], see :mod:`mmalign.sampling.decoding`.
        memory: ``checkpoint`` holds one latent a step and runs each step with a gradient twice;
            ``adjoint`` the same with one vector-Jacobian product at a time; ``store`` keeps all
            activations.
        unconditional: with guidance, whether the gradient goes ``through`` the unconditional
            branch, as is true, or that is ``detached``.
        decode_chunk: pictures decoded together; 0 is a whole micro-batch.
        kl_beta: :math:`\beta`; above 0 costs two evaluations (and a backward pass) of each step
            that has a gradient.
        norms: log the norm of the gradient at every state, per sample.
    """

    process: ClassVar[Process] = "gradient"

    weight: float = 1.0
    margin: float | None = None
    clamp: Clamp = "straight_through"
    memory: Memory = "checkpoint"
    unconditional: Unconditional = "through"
    decode_chunk: int = 0
    kl_beta: float = 0.0
    norms: bool = False

    def __post_init__(self) -> None:
        for name in ("weight", "kl_beta", "decode_chunk"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"objective.{name} is {getattr(self, name)}; it must be 0 or more"
                )

    @property
    def needs(self) -> frozenset[str]:
        """Which other weights the loop must keep for this objective."""
        return frozenset({"reference"} if self.kl_beta > 0 else ())

    def loss(self, reward: Tensor) -> Tensor:
        """``(b,)`` of rewards ``(b,)``."""
        if self.margin is None:
            return -self.weight * reward
        return self.weight * torch.relu(self.margin - reward)

    def path(self, steps: int, rng: Random) -> Path:
        """The path of one training step on a grid of ``steps``."""
        raise NotImplementedError

    def check_steps(self, steps: int) -> None:
        """Refuse options that do not fit a grid of ``steps``. Raises ``ConfigError``."""


def at_most(steps: int, least: int = 1, **options: int) -> None:
    """Refuse step counts outside of ``least..steps``.

    Raises:
        ConfigError: names the option and its value.
    """
    for name, value in options.items():
        if not least <= value <= steps:
            raise ConfigError(
                f"objective.{name} is {value}; with rollout.steps {steps} it must lie in "
                f"{least}..{steps}"
            )
