r"""The sampler of consistency models: predict the picture, noise it afresh, predict again.

.. math:: x' = a' \hat x_0 + b' z, \qquad z \sim N(0, 1)

(multistep consistency sampling, Song et al., 2303.01469, algorithm 1; what stock schedulers call
stochastic sampling, or LCM).  It throws the estimated noise away, so that states have the right law
exactly where :math:`\hat x_0` is a sample and not a mean: never use it on a model that was not
distilled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from mmalign.protocols import Parameterisation
from mmalign.sampling.kernels import Reduce, transition
from mmalign.sampling.process import coefficients, like, split
from mmalign.types import Step


@dataclass(frozen=True, kw_only=True)
class ConsistencyKernel:
    """Multistep consistency sampling; its density is that of the fresh noise.

    Attributes:
        log_prob_reduce: ``mean`` or ``sum`` over the latent's elements.
        parameterisation: what predictions are; set by the policy.
    """

    fits: ClassVar[tuple[Parameterisation, ...]] = ("flow", "epsilon", "v")
    stochastic: ClassVar[bool] = True

    log_prob_reduce: Reduce = "mean"
    parameterisation: Parameterisation = "flow"

    def bound(self, parameterisation: Parameterisation) -> ConsistencyKernel:
        """The same kernel for predictions of ``parameterisation``."""
        return replace(self, parameterisation=parameterisation)

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
        clean, _ = split(self.parameterisation, x, sigma, prediction)
        signal, std = coefficients(self.parameterisation, like(sigma_next, x))
        mean = signal * clean
        return transition(mean, std, clean, noise, x_next, self.log_prob_reduce)
