"""A policy without weights and a sampler that draws scenes: real pictures, no network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from mmalign.protocols import Sampler
from mmalign.shapes import parse, render, sample_scene, sample_spec
from mmalign.types import Media


class Painter:
    """Stands in for a policy; only what the harness reads."""

    name, family, parameterisation, media = "painter", "sd3", "flow", "image"
    sampler = Sampler(steps=10, guidance_scale=3.0, height=64, width=64)
    device = torch.device("cpu")

    def __init__(self, weight: float = 1.0) -> None:
        self.denoiser = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.denoiser.weight, weight)
        torch.nn.init.constant_(self.denoiser.bias, 0.0)


@dataclass
class Sketch:
    """Draws what the prompt asks for with probability ``skill``, decided by the seed alone.

    ``noisy`` is the share of pictures that are noise, which no judge can score.  Every prompt
    asked for is kept in ``asked``.
    """

    skill: float = 1.0
    noisy: float = 0.0
    asked: list[tuple[str, int]] = field(default_factory=list)

    def __call__(
        self,
        policy: object,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> tuple[Media, int]:
        """Media of ``B`` scenes; ``steps`` network evaluations a picture."""
        pairs = [*zip(prompts, seeds, strict=True)]
        self.asked += pairs
        return Media(torch.stack([self._draw(p, s) for p, s in pairs])), (steps or 0) * len(pairs)

    def _draw(self, prompt: str, seed: int) -> torch.Tensor:
        rng = random.Random(seed)
        luck, noise = rng.random(), rng.random()
        if noise < self.noisy:
            return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed))
        spec = parse(prompt)
        scene = sample_scene(spec, rng)
        while luck >= self.skill and scene.satisfies(spec):
            scene = sample_scene(sample_spec(rng, "train", spec.task), rng)
        return Media.from_pil([render(scene)]).data[0]


@pytest.fixture(scope="session")
def studio() -> SimpleNamespace:
    """The classes above, for test modules that cannot import a conftest."""
    return SimpleNamespace(Painter=Painter, Sketch=Sketch)
