"""Cheap training: a tiny stock pipeline, a policy of two parameters, brightness as reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mmalign.protocols import Sampler
from mmalign.types import Conditioning, Media
from trainers.config import EvaluationConfig, ModelConfig, RolloutConfig, TrainConfig
from vision_rewards.function import FunctionReward


class Line(nn.Module):
    """Velocity ``slope x + shift``."""

    def __init__(self, slope: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + self.shift


class LinePolicy:
    """A flow policy over one number, which is also its picture; it stands on no pipeline."""

    name, family, parameterisation, media = "line", "line", "flow", "image"
    sampler = Sampler(steps=4, guidance_scale=1.0, height=1, width=1)
    device = torch.device("cpu")
    unused_modules = ()

    def __init__(self, **parameters: float) -> None:
        self.denoiser = Line(**parameters)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"none": torch.zeros(len(prompts), 1)})

    def init_noise(self, seeds: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return torch.stack([torch.randn(1, 1, 1, generator=g) for g in generators])

    def sigmas(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def predict(self, latents, sigma, conditioning, guidance_scale) -> Tensor:
        return self.denoiser(latents)

    def decode(self, latents: Tensor) -> Media:
        return Media(latents)


def brightness(media: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of all pixels."""
    return media.flatten(1).mean(1)


def cheap(folder: Path, **changes) -> TrainConfig:
    """A recipe for the tiny pipeline: 3 steps of 2 prompts x 4 images; ``a__b`` sets ``a.b``."""
    config = TrainConfig(
        policy="tiny-sd3",
        output_dir=str(folder),
        steps=3,
        prompts_per_step=2,
        images_per_prompt=4,
        save_every=100,
        device="cpu",
        model=ModelConfig(adapter="full"),
        rollout=RolloutConfig(steps=3, guidance_scale=1.0),
        evaluation=EvaluationConfig(enabled=True),
    )
    nested: dict[str, dict] = {}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        nested.setdefault(section, {})[key] = value
    values = {
        section: keys[""] if "" in keys else replace(getattr(config, section), **keys)
        for section, keys in nested.items()
    }
    return replace(config, **values)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The above, for test modules that cannot import a conftest."""
    return SimpleNamespace(
        LinePolicy=LinePolicy,
        brightness=FunctionReward(brightness, takes="tensor"),
        cheap=cheap,
    )
