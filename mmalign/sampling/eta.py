r"""Steps that renew a share of the noise of their own for each sample.

.. math:: x' = a' \hat x_0 + \sqrt{b'^2 - s^2}\, \hat\epsilon + s z

with :math:`s = b' \sin(\eta \pi / 2)` for flow models (coefficient-preserving, as kernel ``cps``)
and DDIM's :math:`s = \eta (b' / b) \sqrt{1 - a^2 / a'^2}` for the others.  :math:`\eta = 0` is the
deterministic step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mmalign.protocols import Parameterisation
from mmalign.sampling.kernels import transition
from mmalign.sampling.process import coefficients, like, split
from mmalign.types import Step


@dataclass(frozen=True, kw_only=True, eq=False)
class EtaKernel:
    """The step above.

    Attributes:
        eta: ``(B,)``, each in [0, 1].
        parameterisation: what predictions are; set by the policy.
    """

    fits: ClassVar[tuple[Parameterisation, ...]] = ("flow", "epsilon", "v")
    stochastic: ClassVar[bool] = True

    eta: Tensor
    parameterisation: Parameterisation = "flow"

    def bound(self, parameterisation: Parameterisation) -> EtaKernel:
        """The same kernel for predictions of ``parameterisation``."""
        return replace(self, parameterisation=parameterisation)

    def deviation(self, sigma: Tensor, sigma_next: Tensor, x: Tensor) -> Tensor:
        """``s`` of the step, shaped to broadcast against ``x``."""
        eta = like(self.eta.float(), x)
        (a, b), (c, d) = (
            coefficients(self.parameterisation, like(s, x)) for s in (sigma, sigma_next)
        )
        if self.parameterisation == "flow":
            return d * torch.sin(eta * math.pi / 2)
        return eta * (d / b) * (1 - (a / c).square()).clamp(min=0).sqrt()

    def step(
        self,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        prediction: Tensor,
        noise: Tensor | None = None,
        *,
        x_next: Tensor | None = None,
    ) -> Step:
        """Draw the next state from ``noise``, or evaluate the density of a given ``x_next``."""
        clean, found = split(self.parameterisation, x, sigma, prediction)
        signal, level = coefficients(self.parameterisation, like(sigma_next, x))
        std = self.deviation(sigma, sigma_next, x)
        mean = signal * clean + (level.square() - std.square()).clamp(min=0).sqrt() * found
        return transition(mean, std, clean, noise, x_next)
