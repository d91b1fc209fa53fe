"""The marginal-preserving SDE with a noise level of its own at every step of the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mmalign.sampling.kernels import _GaussianKernel, _sde_moments


@dataclass(frozen=True, kw_only=True)
class StepSdeKernel(_GaussianKernel):
    """DanceGRPO's step with ``g = levels[k]`` at ``sigma = sigmas[k]``: ``std = g sqrt(h)``.

    Between the given noise levels ``g`` is interpolated linearly, beyond them it is constant, so
    that a table made on one grid serves another.  Equal levels are ``dance_sde``.

    Attributes:
        sigmas: in (0, 1], strictly descending.
        levels: as many diffusion coefficients, not negative.

    Raises:
        ValueError: the two do not fit, or a value is out of range.
    """

    sigmas: Sequence[float] = (1.0,)
    levels: Sequence[float] = (0.3,)

    def __post_init__(self) -> None:
        sigmas, levels = tuple(map(float, self.sigmas)), tuple(map(float, self.levels))
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "levels", levels)
        if len(sigmas) != len(levels) or not sigmas:
            raise ValueError(
                f"step_sde needs one level for each sigma, got {len(levels)} levels for "
                f"{len(sigmas)} sigmas"
            )
        falling = all(a > b for a, b in pairwise(sigmas))
        if not falling or sigmas[0] > 1 or sigmas[-1] <= 0:
            raise ValueError(f"step_sde sigmas must descend within (0, 1], got {sigmas}")
        if min(levels) < 0:
            raise ValueError(f"step_sde levels must not be negative, got {levels}")

    def level(self, sigma: Tensor) -> Tensor:
        """``g`` at ``sigma``, of its shape."""
        if len(self.sigmas) == 1:
            return torch.full_like(sigma, self.levels[0])
        xs = torch.tensor(self.sigmas[::-1], device=sigma.device)
        ys = torch.tensor(self.levels[::-1], device=sigma.device)
        above = torch.bucketize(sigma, xs).clamp(1, len(xs) - 1)
        share = (sigma - xs[above - 1]) / (xs[above] - xs[above - 1])
        return torch.lerp(ys[above - 1], ys[above], share.clamp(0, 1))

    def moments(
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor, prediction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the step; shapes as in :meth:`step`."""
        return _sde_moments(x, sigma, sigma_next, prediction, self.level(sigma))
