r"""DiffusionNFT (Zheng et al., 2509.16117): negative-aware fine-tuning on the forward process.

A reward in [0, 1] splits the old policy into an implicit positive and an implicit negative one:

.. math:: r = \mathrm{clip}(1/2 + A / (2 A_{max}), 0, 1), \qquad
          v^+ = v_{old} + b (v_\theta - v_{old}), \quad v^- = v_{old} - b (v_\theta - v_{old})

.. math:: L = A_{max} [r\, l^+ + (1 - r)\, l^-] / b + \beta\, \mathrm{mean}_D (v_\theta - v_{ref})^2

where :math:`l^\pm` are errors of the clean estimates :math:`x_\sigma - \sigma v^\pm`, each divided
by its own mean absolute value, held constant. At :math:`v_\theta = v_{old}` both errors agree and
the gradient is :math:`A_{max} (2 r - 1) \nabla l`. For the plain squared error the minimum is
:math:`v_{old} + (2 / b)\,\bar r\,(v_{+} - v_{old})`, :math:`v_+` the velocity of the old samples
weighted by :math:`r` and :math:`\bar r` their mean: a step in the direction of improvement.

Rollouts are made by the old policy, a copy that follows the weights by ``old_decay``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from trainers.config import Decay
from trainers.matching import clean_error, distance, not_negative, positive
from trainers.objective import ForwardBatch, Process


def optimality(advantage: Tensor, advantage_max: float) -> Tensor:
    r"""The probability of being good that an advantage stands for, in [0, 1], fp64."""
    return (0.5 + advantage.double() / (2 * advantage_max)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class DiffusionNft:
    """The DiffusionNFT objective.

    Attributes:
        strength: :math:`b`; smaller values take larger steps from the old policy.
        advantage_max: :math:`A_{max}`, the advantage that counts as certainly good.
        kl_beta: weight of the squared distance to the reference velocity; 0 spares its pass.
        adaptive: divide each error by its mean absolute value.
        old_decay: how the old policy follows the weights after each rollout.
    """

    process: ClassVar[Process] = "forward"
    sampler: ClassVar[str] = "old"

    strength: float = 1.0
    advantage_max: float = 5.0
    kl_beta: float = 1e-4
    adaptive: bool = True
    old_decay: Decay = field(default_factory=lambda: Decay(rate=0.001, cap=0.5))

    def __post_init__(self) -> None:
        positive(strength=self.strength, advantage_max=self.advantage_max)
        not_negative(kl_beta=self.kl_beta)

    @property
    def needs(self) -> frozenset[str]:
        """Which extra passes the loop must make for this objective."""
        return frozenset({"old", "reference"} if self.kl_beta > 0 else {"old"})

    @property
    def copies(self) -> Mapping[str, Decay]:
        """The copies of the weights that the loop must keep."""
        return {"old": self.old_decay}

    def loss(self, batch: ForwardBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample loss ``(b,)`` and per-sample metrics."""
        old, b = batch.others["old"].double(), self.strength
        away = b * (batch.velocity.double() - old)
        good = clean_error(batch, old + away, self.adaptive)
        bad = clean_error(batch, old - away, self.adaptive)
        r = optimality(batch.advantage, self.advantage_max)
        loss = self.advantage_max / b * (r * good + (1 - r) * bad)
        metrics = {
            "error": good.detach(),
            "optimality": r,
            "old_distance": distance(batch.velocity, old).detach(),
        }
        if self.kl_beta > 0:
            far = distance(batch.velocity, batch.others["reference"])
            loss = loss + self.kl_beta * far
            metrics["reference_distance"] = far.detach()
        return loss, metrics
