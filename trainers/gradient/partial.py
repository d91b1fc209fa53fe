r"""Partial chains: edit a noised picture instead of generating one (InstructVideo, 2312.12490).

Clean latents :math:`z` are noised to the level at which :math:`\tau N` steps remain, and only those
are run, with a gradient through the last ``K``:

.. math:: x_s = a_s z + b_s \epsilon, \quad s = N - \tau N, \qquad
          L = -w\,r(\mathrm{decode}(x_0), c).

A step costs :math:`\tau N` evaluations, and the pictures stay near those they are made of, which
keeps the reward from being gamed in ways that real pictures do not show. :math:`\tau = 1` starts at
the highest level, which still holds what the schedule leaves of :math:`z`.

This is the case of images. The latents are those of given pictures (``source: data``, the recipe's
``pairs``, whose labels are not looked at), as in the paper; or of the model's own samples, which
cost a whole chain without a gradient first. Not here: videos and their sparse, attenuated frame
rewards, and offset noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from mmalign.config import ConfigError
from trainers.gradient.objective import Path, RewardGradient, at_most, tail


@dataclass(frozen=True, kw_only=True)
class Partial(RewardGradient):
    r"""Reward fine-tuning by editing.

    Attributes:
        strength: :math:`\tau` in (0, 1]. The paper finds 0.1 to 0.5 to collapse on long training.
        last: :math:`K`, the steps with a gradient; 0 is all that are run.
        source: ``own`` samples, or the pictures of ``data``.
    """

    strength: float = 0.6
    last: int = 1
    source: Literal["own", "data"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength <= 1:
            raise ConfigError(f"objective.strength is {self.strength}; it must lie in (0, 1]")

    @property
    def needs_data(self) -> bool:
        """Whether the recipe must give pictures."""
        return self.source == "data"

    def length(self, steps: int) -> int:
        """Steps of a grid of ``steps`` that are run."""
        return max(1, round(self.strength * steps))

    def path(self, steps: int, rng: Random) -> Path:
        """The end of the grid, from noised latents."""
        count = self.length(steps)
        return Path(tail(count, count - (self.last or count)), start=steps - count, renoise=True)

    def check_steps(self, steps: int) -> None:
        """Refuse more steps with a gradient than are run."""
        at_most(self.length(steps), 0, last=self.last)
