"""Pictures with their scenes: what the small reward models are trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.runtime.files import atomic_path
from mmalign.shapes import (
    SHAPES,
    ObjectSpec,
    PromptSpec,
    Scene,
    render,
    render_layout,
    sample_scene,
    sample_spec,
)
from mmalign.shapes.splits import trainable_pair
from trainers.pretrain import data


def unnamed_scene(rng: random.Random) -> Scene:
    """A scene of three or four objects of several shapes, of which no caption is true.

    Generators draw one object too many; a model that has only seen pictures some caption
    describes would not know that this makes a caption false.
    """
    while True:
        spec = sample_spec(rng, "train", "counting")
        scene = sample_scene(spec, rng, trainable_pair)
        if len(scene.objects) < 3:
            continue
        other = sample_scene(PromptSpec((ObjectSpec(_another(spec, rng)),)), rng, trainable_pair)
        source = other.objects[0]
        kept, last = scene.objects[:-1], scene.objects[-1]
        odd = type(last)(
            source.shape, source.color, last.x, last.y, last.radius, source.rotation, source.rgb
        )
        return Scene((*kept, odd), scene.background)


def _another(spec: PromptSpec, rng: random.Random) -> str:
    return rng.choice([s for s in SHAPES if s != spec.objects[0].shape])


@dataclass(frozen=True)
class Pool:
    """Pictures ``(N, 64, 64, 3)`` uint8, layouts ``(N, 8, 8, 13)`` uint8, scenes, what was asked.

    ``specs[i]`` is ``None`` where no caption is true.
    """

    images: np.ndarray
    layouts: np.ndarray
    scenes: list[Scene]
    specs: list[PromptSpec | None]

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Pictures of the rows, ``(B, 3, H, W)`` fp32 in [0, 1]."""
        return to_pixels(self.images[rows])


def to_pixels(images: np.ndarray) -> Tensor:
    """``(B, H, W, 3)`` uint8 to ``(B, 3, H, W)`` fp32 in [0, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float().div(255).contiguous()


def load_pool(folder: Path, shards: int, unnamed: int, decoded: float, cache: Path) -> Pool:
    """Rendered training pictures, further scenes without a caption, some through the codec.

    Args:
        folder: where shards are, or are rendered to.
        shards: how many.
        unnamed: number of scenes of which no caption is true.
        decoded: share of the pictures replaced by their reconstruction from noisy latents: the
            look of a generator's pictures.
        cache: file the reconstructions are kept in.
    """
    paths = data.ensure_shards(folder, shards)
    opened = [np.load(p) for p in paths]
    known = [pair for i in range(shards) for pair in data.shard_scenes(i)]
    rng = random.Random("unnamed scenes")
    extra = [unnamed_scene(rng) for _ in range(unnamed)]
    drawn = [np.asarray(render(s)) for s in extra]
    images = np.concatenate([*(z["images"] for z in opened), *([np.stack(drawn)] if drawn else [])])
    maps = [*(z["layouts"] for z in opened)]
    if extra:
        maps.append(np.stack([render_layout(s) for s in extra]))
    rows = np.random.default_rng(0).permutation(len(images))[: int(decoded * len(images))]
    if len(rows):
        images[rows] = _through_codec(images[rows], cache)
    return Pool(
        images,
        np.concatenate(maps),
        [scene for _, scene in known] + extra,
        [spec for spec, _ in known] + [None] * len(extra),
    )


def _through_codec(images: np.ndarray, cache: Path) -> np.ndarray:
    if cache.exists():
        return np.asarray(np.load(cache)["images"])
    decoded = reconstruct(images)
    with atomic_path(cache) as partial, partial.open("wb") as file:
        np.savez(file, images=decoded)
    return decoded


@torch.no_grad()
def reconstruct(images: np.ndarray, noise: float = 0.25, seed: int = 0) -> np.ndarray:
    """Pictures ``(N, H, W, 3)`` uint8 through the shipped autoencoder, latents up to ``noise`` off.

    ``noise`` is in deviations of the latents; each picture draws its level uniformly below it.
    """
    vae = shipped_autoencoder()
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for block in np.array_split(images, max(1, len(images) // 128)):
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encoder(to_pixels(block) * 2 - 1)
            level = noise * torch.rand(len(block), 1, 1, 1, generator=generator)
            level = level / vae.config.scaling_factor
            shaken = latents + level * torch.randn(latents.shape, generator=generator)
            output = vae.decoder(shaken).float() / 2 + 0.5
        parts.append(output.clamp(0, 1).mul(255).round().to(torch.uint8))
    return torch.cat(parts).permute(0, 2, 3, 1).numpy()


def shipped_autoencoder() -> Any:
    """The autoencoder of the shipped generator, fp32, in evaluation mode."""
    from diffusers import AutoencoderTiny

    from mmalign.assets import asset

    folder = str(asset("shapes-flow/vae"))
    return AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32).eval()
