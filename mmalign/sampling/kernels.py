r"""Transition kernels of flow models: where samplers differ, and the only place they do.

Notation: ``sigma`` in [0, 1] is the noise level, ``x = (1 - sigma) x0 + sigma eps``, the network
predicts ``v = eps - x0``, hence ``x0_hat = x - sigma v`` and ``eps_hat = x + (1 - sigma) v``.
``h = sigma - sigma_next > 0``.

**Log-probability convention.**  ``log_prob`` is the *mean* over all latent elements of the Gaussian
log-density, in fp32.  It is the true log-density divided by the number of elements D, so a ratio
built from it is the D-th root of the true ratio; the clip ranges of the image literature
(1e-5 .. 1e-3) belong to this convention.  ``log_prob_reduce="sum"`` gives the true density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.registry import KERNELS
from mmalign.sampling.process import like
from mmalign.types import Step

Reduce = Literal["mean", "sum"]


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor, reduce: Reduce = "mean") -> Tensor:
    """Log-density of ``x`` under ``N(mean, std^2)``, reduced over all but the batch: ``(B,)``.

    ``std`` must be positive and broadcastable to ``x``.
    """
    z = (x - mean) / std
    density = -0.5 * z.square() - torch.log(std) - 0.5 * math.log(2 * math.pi)
    flat = density.expand_as(x).flatten(1)
    return flat.mean(1) if reduce == "mean" else flat.sum(1)


def transition(
    mean: Tensor,
    std: Tensor,
    clean: Tensor,
    noise: Tensor | None,
    x_next: Tensor | None,
    reduce: Reduce = "mean",
) -> Step:
    """A step to ``N(mean, std^2)``: drawn from ``noise``, or the density of a given ``x_next``.

    Exactly one of ``noise`` and ``x_next`` must be given. The next state is detached inside the
    density: the gradient flows through the mean and the deviation only.

    Raises:
        ValueError: both of them, or neither.
    """
    if (noise is None) == (x_next is None):
        raise ValueError("give exactly one of noise (to sample) and x_next (to replay)")
    if noise is not None:
        x_next = mean + std * noise
    assert x_next is not None
    # A zero deviation (the step to a clean picture) is a point mass: no density, not density 0.
    density = bool((std > 0).all())
    log_prob = gaussian_log_prob(x_next.detach(), mean, std, reduce) if density else None
    return Step(x_next, mean, std, log_prob, clean)


@dataclass(frozen=True, kw_only=True)
class OdeKernel:
    """Euler step of the probability-flow ODE: ``x - h v``. It has no density."""

    stochastic = False

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
        """One Euler step; ``noise`` is ignored.

        Raises:
            ValueError: ``x_next`` was given; a deterministic step has no density to replay.
        """
        if x_next is not None:
            raise ValueError(
                "the ODE kernel has no log-probability, so its steps cannot be replayed; "
                "record steps of a stochastic kernel (flow_sde, dance_sde, cps)"
            )
        s, n = like(sigma, x).float(), like(sigma_next, x).float()
        # Written as the stock scheduler writes it, so that results agree bit for bit.
        mean = x + (n - s) * prediction
        zero = torch.zeros((), device=x.device)
        return Step(mean, mean, zero, None, x - s * prediction)


@dataclass(frozen=True, kw_only=True)
class _GaussianKernel:
    """Shared by all stochastic kernels: a subclass gives the mean and the standard deviation."""

    log_prob_reduce: Reduce = "mean"
    stochastic = True

    def moments(
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor, prediction: Tensor
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

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
        s, n = like(sigma, x).float(), like(sigma_next, x).float()
        mean, std = self.moments(x, s, n, prediction)
        clean = x - s * prediction
        return transition(mean, std, clean, noise, x_next, self.log_prob_reduce)


def _sde_moments(
    x: Tensor, s: Tensor, n: Tensor, v: Tensor, g: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of one Euler-Maruyama step of the marginal-preserving SDE.

    ``mean = x - h [v + g^2 / (2 sigma) eps_hat]``, ``std = g sqrt(h)`` for any diffusion
    coefficient ``g`` (Flow-GRPO, 2505.05470, eq. 8-9; DanceGRPO, 2505.07818, eq. 10).
    """
    h = s - n
    g = torch.as_tensor(g, device=x.device, dtype=torch.float32)
    eps_hat = x + (1 - s) * v
    return x - h * (v + g**2 / (2 * s) * eps_hat), g * torch.sqrt(h)


@dataclass(frozen=True, kw_only=True)
class FlowSdeKernel(_GaussianKernel):
    """Flow-GRPO's SDE: ``g = noise_level * sqrt(sigma / (1 - sigma))``.

    ``g`` diverges at sigma = 1; there the denominator uses ``sigma_max``, as the reference code
    does with the second value of its grid. ``sigma_max`` is explicit here, because tying it to
    the grid would change the first step's noise with the number of steps.
    """

    noise_level: float = 0.7
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        _not_negative("flow_sde noise_level", self.noise_level)
        if self.sigma_max is not None and not 0 < self.sigma_max < 1:
            raise ValueError(f"flow_sde sigma_max must lie in (0, 1), got {self.sigma_max}")

    def moments(
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor, prediction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the step; shapes as in :meth:`step`."""
        limit = sigma_next if self.sigma_max is None else torch.tensor(self.sigma_max)
        limit = limit.to(sigma.device, torch.float32).expand_as(sigma)
        denominator = 1 - torch.where(sigma >= 1, limit, sigma)
        g = self.noise_level * torch.sqrt(sigma / denominator)
        return _sde_moments(x, sigma, sigma_next, prediction, g)


@dataclass(frozen=True, kw_only=True)
class DanceSdeKernel(_GaussianKernel):
    """DanceGRPO's SDE: the same step with a constant ``g = eta``."""

    eta: float = 0.3

    def __post_init__(self) -> None:
        _not_negative("dance_sde eta", self.eta)

    def moments(
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor, prediction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the step; shapes as in :meth:`step`."""
        return _sde_moments(x, sigma, sigma_next, prediction, self.eta)


@dataclass(frozen=True, kw_only=True)
class CpsKernel(_GaussianKernel):
    """Coefficient-preserving sampling (Flow-CPS, 2509.05952).

    ``std = sigma_next sin(noise_level pi / 2)`` and
    ``mean = (1 - sigma_next) x0_hat + sqrt(sigma_next^2 - std^2) eps_hat``: the coefficients of
    signal and of total noise stay on schedule, so no noise is left in the picture.  The reference
    drops the density's scale (``log_prob = -mean (x' - mean)^2``); here it is the true Gaussian
    density, so clip ranges are comparable with the other kernels.

    Raises:
        ValueError: ``noise_level`` outside [0, 1]; above 1 the sine folds back.
    """

    noise_level: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.noise_level <= 1:
            raise ValueError(f"CPS noise_level must lie in [0, 1], got {self.noise_level}")

    def moments(
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor, prediction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the step; shapes as in :meth:`step`."""
        std = sigma_next * math.sin(self.noise_level * math.pi / 2)
        x0 = x - sigma * prediction
        eps_hat = x + (1 - sigma) * prediction
        kept = sigma_next * math.cos(self.noise_level * math.pi / 2)
        return (1 - sigma_next) * x0 + kept * eps_hat, std


def _not_negative(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def build_kernel(name: str, **options: Any) -> Any:
    """A kernel by registered name, e.g. ``build_kernel("flow_sde", noise_level=0.7)``.

    Raises:
        UnknownNameError: unknown name. ValueError: an option the kernel does not take.
    """
    cls = KERNELS.load(name)
    known = cls.__dataclass_fields__
    for key in options:
        if key not in known:
            from mmalign.registry import unknown

            raise unknown(f"option of kernel {name!r}:", key, known)
    return cls(**options)
