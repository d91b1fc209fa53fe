"""A policy of one number that can encode pictures, and files of grey pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign.types import Media
from trainers import checkpoint
from trainers.config import ForwardConfig, OptimConfig, RolloutConfig, TrainConfig
from trainers.pair_config import PairConfig


def grey(path: Path, value: float) -> None:
    """A picture of one pixel; its latent is ``4 value - 2``."""
    level = round(255 * value)
    Image.new("RGB", (1, 1), (level, level, level)).save(path)


def write_pairs(folder: Path, labels: Sequence[object], seed: int = 0) -> Path:
    """Pairs of a bright picture, a, and a dark one, b, each of another prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(seed), []
    for n, label in enumerate(labels):
        a, b = f"{n}_a.png", f"{n}_b.png"
        grey(folder / a, 0.7 + 0.25 * rng.random())
        grey(folder / b, 0.05 + 0.25 * rng.random())
        lines.append({"prompt": f"p{n}", "image_a": a, "image_b": b, "label": label})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def greys(kit) -> SimpleNamespace:
    """The above, a policy over such pictures and a recipe for it."""

    class Encoder(kit.LinePolicy):
        """A line whose latents are brightnesses from -2 to 2."""

        codec_identity = "line"

        def encode_image(self, media: Media) -> Tensor:
            return 4 * media.data[:, :1] - 2

    def recipe(folder: Path, data: Path | None, algorithm: str = "diffusion_dpo", **changes):
        config = TrainConfig(
            policy="line", algorithm=algorithm, output_dir=str(folder), steps=20, save_every=1000,
            prompts_per_step=4, images_per_prompt=2 if data else 8,
            model=kit.cheap(folder).model,
            rollout=RolloutConfig(steps=4, guidance_scale=1.0, kernel="ode"),
            forward=ForwardConfig(levels=(0.2, 1.0), draws=2),
            optim=OptimConfig(lr=0.05),
            pairs=PairConfig(data=str(data)) if data else None,
        )  # fmt: skip
        return replace(config, **changes)

    def drawn(policy) -> float:
        """Mean of what the policy draws with four steps, for 200 seeds."""
        from mmalign.sampling import generate

        media, _ = generate(policy, ["x"] * 200, list(range(200)), steps=4, guidance_scale=1.0)
        return float(media.data.mean())

    def held(folder: Path) -> dict:
        """Every version of the weights in a run's latest checkpoint."""
        file = checkpoint.existing(folder / "checkpoints")[-1] / checkpoint.FILE
        return torch.load(file, weights_only=True)["model"]

    torch.set_num_threads(1)
    return SimpleNamespace(
        Policy=Encoder, write=write_pairs, recipe=recipe, drawn=drawn, grey=grey, held=held
    )
