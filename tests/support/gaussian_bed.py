"""A diffusion model that is exactly right, whose tilted law is known: x0 ~ N(0, 1).

With a variance-preserving schedule every marginal is N(0, 1), the clean estimate is
``sqrt(abar) x``, and the reverse kernel ``N(sqrt(alpha) x, 1 - alpha)`` is exact, so that sampling
has no error of its own.  A sample is a picture of one number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.protocols import RewardInfo, Sampler
from mmalign.sampling.process import kept_signal, split
from mmalign.types import Conditioning, Media, Score, Step

STEPS = 50


class ExactKernel:
    """``x' ~ N(sqrt(alpha) x, 1 - alpha)`` with ``alpha = abar / abar'``: the exact reverse."""

    fits = ("epsilon",)
    stochastic = True

    def step(self, x, sigma, sigma_next, prediction, noise=None, *, x_next=None) -> Step:
        alpha = kept_signal(sigma) / kept_signal(sigma_next)
        mean, std = alpha.sqrt() * x, (1 - alpha).sqrt()
        clean, _ = split("epsilon", x, sigma, prediction)
        return Step(mean + std * noise, mean, std, None, clean)


class GaussianPolicy:
    """The exact model as a policy; prompts mean nothing to it."""

    name, family, parameterisation, media = "gaussian", "gaussian", "epsilon", "image"
    sampler = Sampler(steps=STEPS, guidance_scale=1.0, height=1, width=1)
    device = torch.device("cpu")
    unused_modules: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.denoiser = nn.Identity()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"embeds": torch.zeros(len(prompts), 1)})

    def init_noise(self, seeds: Sequence[int]) -> Tensor:
        rows = [torch.randn(1, 1, 1, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows)

    def sigmas(self, steps: int) -> Tensor:
        assert steps == STEPS
        abar = torch.cumprod(1 - torch.linspace(1e-3, 0.12, STEPS, dtype=torch.float64), 0)
        return torch.cat([(1 - abar.flip(0)).sqrt(), torch.zeros(1, dtype=torch.float64)])

    def predict(self, latents, sigma, conditioning, guidance_scale) -> Tensor:
        return sigma.float() * latents

    def decode(self, latents: Tensor) -> Media:
        return Media(latents)


class FlatReward:
    """A function of the one number ``x`` of each sample."""

    info = RewardInfo(name="flat", needs=("prompt",))
    identity = "flat"

    def __init__(self, fn: Any) -> None:
        self.fn, self.calls = fn, 0

    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        self.calls += 1
        return Score.of(self.fn(media.data.flatten(1).mean(1)))


def quadratic(centre: float = 1.5) -> FlatReward:
    """``-(x - c)^2 / 2``: with strength ``l`` the law becomes N(l c / (1 + l), 1 / (1 + l))."""
    return FlatReward(lambda x: -((x - centre) ** 2) / 2)


def linear(slope: float = 1.0) -> FlatReward:
    """``a x``: with strength ``l`` the law becomes N(l a, 1)."""
    return FlatReward(lambda x: slope * x)


def moments(steered: Any) -> tuple[float, float]:
    """Weighted mean and variance of the finished particles of the first prompt."""
    rows = [i for i, line in enumerate(steered.lineage) if line["prompt"] == 0]
    x = steered.candidates.data.flatten().double()[rows]
    w = torch.tensor([steered.lineage[i]["weight"] for i in rows], dtype=torch.float64)
    mean = float((w * x).sum())
    return mean, float((w * (x - mean) ** 2).sum())
