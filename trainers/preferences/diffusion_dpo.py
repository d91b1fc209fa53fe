r"""Diffusion-DPO (Wallace et al., 2311.12908): direct preference optimisation on noised pictures.

The optimum of a reward under a KL to the reference has :math:`r = \beta \log (p_\theta / p_{ref})`
plus a constant of the prompt. The log-ratio of a picture is bounded by errors of the network at one
noise level :math:`\sigma` and noise :math:`\epsilon`, the same for winner and loser:

.. math:: D_i = e_\theta(i) - e_{ref}(i), \qquad z = -\frac{\beta}{2} w(\sigma) (D_w - D_l), \qquad
          L = -\log \mathrm{sigmoid}(z)

with :math:`e` the mean squared error of the prediction. At the reference :math:`L = \log 2` and its
gradient is :math:`(\beta / 4) w \nabla (e_w - e_l)`. With labels that may be wrong (probability
:math:`q` that the first won, smoothing :math:`s`) the loss is
:math:`q' L(z) + (1 - q') L(-z)`, :math:`q' = (1 - s) q + s (1 - q)`.

``form: hinge`` is :math:`\max(0, 1 - z)` (SLiC). Flow models have the velocity in the place of the
noise; ``error: noise`` weighs it so that the loss is the one of an epsilon model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from trainers.preferences.pairwise import ReferencePairs


@dataclass(frozen=True, kw_only=True)
class DiffusionDpo(ReferencePairs):
    """The Diffusion-DPO objective; options of :class:`.pairwise.ReferencePairs`.

    Attributes:
        form: ``sigmoid``, or ``hinge``.
    """

    form: Literal["sigmoid", "hinge"] = "sigmoid"

    def pair_loss(self, z: Tensor) -> Tensor:
        """The loss of pairs whose first won, ``(n,)``."""
        return F.softplus(-z) if self.form == "sigmoid" else F.relu(1 - z)
