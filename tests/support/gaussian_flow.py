"""A flow whose data are N(mean, scale^2), in closed form; a sample is a picture of one number.

Its state at ``sigma`` is N((1 - sigma) mean, r^2) with ``r^2 = (1 - sigma)^2 scale^2 + sigma^2``,
and a path of its ODE keeps ``(x - (1 - sigma) mean) / r``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmalign.protocols import Sampler
from mmalign.types import Conditioning, Media

MEAN, SCALE = 0.5, 0.4


class GaussianFlow(nn.Module):
    """Velocities of the flow, and of students of it.

    Args:
        leap: from 0, the velocity of the ODE, to 1, the chord to where its path meets the next of
            ``windows`` equal edges.
        spread: at pure noise, what of it the clean estimate keeps; the ODE's estimate keeps none.
    """

    def __init__(self, leap: float = 0.0, spread: float = 0.0, windows: int = 1) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(MEAN))
        self.scale = nn.Parameter(torch.tensor(SCALE))
        self.leap = nn.Parameter(torch.tensor(leap))
        self.spread = nn.Parameter(torch.tensor(spread))
        self.windows = windows

    def radius(self, sigma: Tensor) -> Tensor:
        return ((1 - sigma).square() * self.scale.square() + sigma.square()).sqrt()

    def at(self, x: Tensor, sigma: Tensor, other: Tensor, mean: Tensor) -> Tensor:
        """Where the path through ``x`` at ``sigma`` is at another level."""
        unit = (x - (1 - sigma) * mean) / self.radius(sigma)
        return (1 - other) * mean + self.radius(other) * unit

    def forward(self, x: Tensor, sigma: Tensor, prompted: Tensor) -> Tensor:
        sigma, mean = sigma.float().view(-1, 1, 1, 1), self.mean * prompted.view(-1, 1, 1, 1)
        slope = sigma - (1 - sigma) * self.scale.square()
        slope = slope / self.radius(sigma).square() - self.spread * (sigma == 1)
        velocity = slope * (x - (1 - sigma) * mean) - mean
        end = ((sigma * self.windows).ceil() - 1).clamp_min(0) / self.windows
        chord = (x - self.at(x, sigma, end, mean)) / (sigma - end).clamp_min(1e-6)
        return velocity + self.leap * torch.where(sigma > end, chord - velocity, 0.0)


class GaussianFlowPolicy:
    """The flow as a policy; without its prompt the mean of the data is 0."""

    name, family, parameterisation, media = "gaussian", "gaussian", "flow", "image"
    sampler = Sampler(steps=8, guidance_scale=1.0, height=1, width=1)
    device = torch.device("cpu")
    unused_modules: tuple[str, ...] = ()

    def __init__(self, **options: float) -> None:
        self.denoiser = GaussianFlow(**options)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        ones = torch.ones(len(prompts), 1)
        return Conditioning({"prompted": ones}, {"prompted": 0 * ones})

    def init_noise(self, seeds: Sequence[int]) -> Tensor:
        rows = [torch.randn(1, 1, 1, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows)

    def sigmas(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def predict(self, latents, sigma, conditioning, guidance_scale) -> Tensor:
        assert guidance_scale == 1
        level = torch.as_tensor(sigma).expand(len(latents))
        return self.denoiser(latents, level, conditioning.positive["prompted"])

    def decode(self, latents: Tensor) -> Media:
        return Media(latents)
