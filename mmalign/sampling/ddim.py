r"""The transition kernel of diffusion models (epsilon- or v-prediction): DDIM with noise.

With ``sigma = sqrt(1 - abar)`` and ``alpha = sqrt(abar)``, primes for the next level,

.. math:: s = \eta \frac{\sigma'}{\sigma} \sqrt{1 - \alpha^2 / \alpha'^2}, \quad
   x' = \alpha' \hat x_0 + \sqrt{\sigma'^2 - s^2}\, \hat\epsilon + s z

(Song et al., 2010.02502, eq. 12 and 16).  ``eta = 0`` is deterministic; ``eta = 1`` is ancestral
sampling, the chain that DDPO (Black et al., 2305.13301) trains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmalign.protocols import Parameterisation
from mmalign.sampling.kernels import Reduce, transition
from mmalign.sampling.process import coefficients, kept_signal, like, split
from mmalign.types import Step


@dataclass(frozen=True, kw_only=True)
class DdimKernel:
    """DDIM step; for the log-probability's convention see :mod:`mmalign.sampling.kernels`.

    Attributes:
        eta: share of the ancestral noise, in [0, 1].
        log_prob_reduce: ``mean`` or ``sum`` over the latent's elements.
        parameterisation: what predictions are; set by the policy (see
            :func:`mmalign.sampling.fit.fitted`).

    Raises:
        ValueError: ``eta`` outside [0, 1].
    """

    fits: ClassVar[tuple[Parameterisation, ...]] = ("epsilon", "v")

    eta: float = 1.0
    log_prob_reduce: Reduce = "mean"
    parameterisation: Literal["epsilon", "v"] = "epsilon"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"ddim eta must lie in [0, 1], got {self.eta}")
        if self.parameterisation not in self.fits:
            raise ValueError(
                f"ddim parameterisation must be epsilon or v, got {self.parameterisation!r}; a "
                "policy sets it, so leave it out"
            )

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise and have a density."""
        return self.eta > 0

    def bound(self, parameterisation: Parameterisation) -> DdimKernel:
        """The same kernel for predictions of ``parameterisation``."""
        return replace(self, parameterisation=parameterisation)  # type: ignore[arg-type]

    def deviation(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """``s`` of the step, fp32, of the shape of the levels."""
        abar, after = kept_signal(sigma), kept_signal(sigma_next)
        variance = ((1 - after) / (1 - abar)) * (1 - abar / after)
        return self.eta * variance.clamp(min=0).sqrt()

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
        """Draw the next state from ``noise``, or evaluate the density of a given ``x_next``.

        Exactly one of them must be given; at ``eta = 0`` noise is ignored and nothing can be
        replayed. The next state is detached inside the density.
        """
        if not self.stochastic and x_next is not None:
            raise ValueError(
                "the ddim kernel with eta 0 has no log-probability, so its steps cannot be "
                "replayed; set rollout.kernel_options eta above 0"
            )
        x0, eps = split(self.parameterisation, x, sigma, prediction)
        sigma, sigma_next = like(sigma, x), like(sigma_next, x)
        signal, _ = coefficients(self.parameterisation, sigma_next)
        std = self.deviation(sigma, sigma_next)
        # Rounding may leave less than nothing where all of the noise is renewed.
        kept = ((1 - kept_signal(sigma_next)) - std.square()).clamp(min=0).sqrt()
        mean = signal * x0 + kept * eps
        if not self.stochastic:
            return Step(mean, mean, torch.zeros((), device=x.device), None, x0)
        return transition(mean, std, x0, noise, x_next, self.log_prob_reduce)
