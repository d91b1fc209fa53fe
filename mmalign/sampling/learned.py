r"""Euler's step with noise whose deviation is learned, one number for each step (ReinFlow).

.. math:: x' = x - h v + s_k z, \qquad
   \ln s_k = \ln s_{min} + \tfrac{1}{2} (1 + \tanh \phi_k) (\ln s_{max} - \ln s_{min})

(Zhang et al., 2505.22094).  Nothing corrects the drift for the noise, as :mod:`the other kernels
<mmalign.sampling.kernels>` do: the noise explores, and is thrown away after training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from mmalign.sampling.kernels import _GaussianKernel


@dataclass(frozen=True, kw_only=True)
class LearnedKernel(_GaussianKernel):
    """Euler's step plus noise of deviation ``std_init``, until :meth:`learnable` binds it to a run.

    Attributes:
        std_min, std_max: bounds of the deviation, ``0 < std_min < std_max``.
        std_init: deviation of every step at first; ``None`` takes the bounds' geometric mean.
        per_channel: learn one deviation for each step and channel of the latents.

    Raises:
        ValueError: the bounds do not rise, or ``std_init`` does not lie between them.
    """

    std_min: float = 0.05
    std_max: float = 0.5
    std_init: float | None = None
    per_channel: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.std_min < self.std_max:
            raise ValueError(
                f"learned std_min {self.std_min} and std_max {self.std_max} must be positive and "
                "rise"
            )
        if not self.std_min < self.initial < self.std_max:
            raise ValueError(
                f"learned std_init must lie between std_min {self.std_min} and std_max "
                f"{self.std_max}, got {self.std_init}"
            )

    @property
    def initial(self) -> float:
        """The deviation that learning starts from."""
        middle = math.sqrt(self.std_min * self.std_max)
        return middle if self.std_init is None else self.std_init

    def learnable(self, sigmas: Tensor, channels: int) -> LearningKernel:
        """The same kernel with parameters, for the grid ``sigmas`` ``(T + 1,)``, ``T >= 2``.

        The last step, which leads to the clean picture and is never noisy, has none. ``channels``
        is the size of the latents' second dimension.
        """
        low, high = math.log(self.std_min), math.log(self.std_max)
        start = math.atanh(2 * (math.log(self.initial) - low) / (high - low) - 1)
        grid = sigmas[:-2].float()
        shape = (len(grid), channels if self.per_channel else 1)
        phi = nn.Parameter(torch.full(shape, start, device=grid.device))
        return LearningKernel(**asdict(self), grid=grid, phi=phi)

    def deviation(self, sigma: Tensor, x: Tensor) -> Tensor:
        """``s`` of the steps that start at ``sigma``, broadcastable to ``x``."""
        return torch.tensor(self.initial, device=x.device)

    def moments(
        self, x: Tensor, sigma: Tensor, sigma_next: Tensor, prediction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the step; shapes as in :meth:`step`."""
        return x + (sigma_next - sigma) * prediction, self.deviation(sigma, x)


@dataclass(frozen=True, kw_only=True, eq=False)
class LearningKernel(LearnedKernel):
    """A :class:`LearnedKernel` with parameters, which its log-probability has gradients for.

    Attributes:
        grid: ``(T - 1,)`` noise levels that noisy steps start from.
        phi: ``(T - 1, 1)``, or ``(T - 1, C)`` with one for each channel.
    """

    grid: Tensor
    phi: nn.Parameter

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What there is to train, by name."""
        return {"noise": self.phi}

    @property
    def stds(self) -> Tensor:
        """All deviations, shaped like ``phi``, with gradient."""
        low, high = math.log(self.std_min), math.log(self.std_max)
        return torch.exp(low + 0.5 * (1 + torch.tanh(self.phi)) * (high - low))

    def deviation(self, sigma: Tensor, x: Tensor) -> Tensor:
        """``s`` of the grid's nearest level: ``(1 or B, 1 or C, 1, ...)``."""
        rows = (self.grid[:, None] - sigma.reshape(1, -1)).abs().argmin(0)
        found = self.stds[rows]
        return found.reshape(*found.shape, *([1] * (x.ndim - 2)))
