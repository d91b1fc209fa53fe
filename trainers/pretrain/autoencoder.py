"""Trains the shapes world's autoencoder, a stock ``diffusers.AutoencoderTiny``.

Two choices matter more than size:

* **Noise on the latents.** The decoder learns to draw clean outlines from imprecise latents,
  which is what a generator will hand it; a decoder trained on exact latents turns every small
  error of the generator into a smeared outline.
* **Depth at low resolution.** Convolutions at 64 x 64 are what costs time; the decoder's
  residual blocks sit at 16 x 16, where they are nearly free.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.runtime.files import atomic_path
from mmalign.runtime.log import say
from mmalign.shapes import TASKS, caption, render, sample_scene, sample_spec
from trainers.muon import Muon
from trainers.pretrain.data import ensure_shards, load_images
from vision_rewards.shapes import verify

ARCHITECTURE: dict[str, Any] = {
    "encoder_block_out_channels": (48, 48, 48),
    "decoder_block_out_channels": (48, 48, 48),
    "num_encoder_blocks": (0, 1, 3),
    "num_decoder_blocks": (5, 2, 0),
    "latent_channels": 4,
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Dials of :func:`train_autoencoder`; the defaults made the shipped weights."""

    data: str = "shapes-cache"
    out: str = "runs/shapes-vae"
    shards: int = 4
    steps: int = 2600
    batch_size: int = 24
    lr: float = 3e-3
    latent_noise: float = 0.25
    latent_penalty: float = 2e-4
    seed: int = 0
    device: str = "cpu"
    save_every: int = 250


def train_autoencoder(config: AutoencoderConfig) -> Path:
    """Train (or resume) the autoencoder; returns the folder of the finished model."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(config.seed)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    images = load_images(ensure_shards(Path(config.data), config.shards))
    model = AutoencoderTiny(**ARCHITECTURE).to(config.device, memory_format=torch.channels_last)
    optimizer = Muon(model.parameters(), lr=config.lr, adam_lr=config.lr / 2)
    step = _resume(out / "state.pt", model, optimizer)
    started, first = time.time(), step
    while step < config.steps:
        for group in optimizer.param_groups:
            group["scale"] = _cosine(step, config.steps, warmup=100)
        batch = _batch(images, config, step)
        loss, metrics = autoencoder_loss(model, batch, config, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            rate = (step - first) * config.batch_size / (time.time() - started)
            say(f"vae step {step}/{config.steps} {metrics} {rate:.0f} img/s")
        if step % config.save_every == 0 or step == config.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            with atomic_path(out / "state.pt") as partial:
                torch.save(state, partial)
    return _finish(model, images, config, out / "vae")


def autoencoder_loss(
    model: torch.nn.Module, batch: torch.Tensor, config: AutoencoderConfig, step: int
) -> tuple[torch.Tensor, str]:
    """Reconstruction from noisy latents, L1 plus squared error, plus a weak pull to small latents.

    ``batch`` is ``(B, 3, H, W)`` in [-1, 1]; half of the batch is decoded without noise.
    """
    generator = torch.Generator(batch.device).manual_seed(config.seed * 1_000_003 + step)
    with torch.autocast(batch.device.type, torch.bfloat16):
        latents = model.encoder(batch)  # type: ignore[operator]
        level = torch.rand(len(batch), 1, 1, 1, generator=generator, device=batch.device)
        # Noise from the start would keep the first outlines from forming.
        ramp = min(1.0, step / (0.3 * config.steps))
        level = (2 * level - 1).clamp_min(0) * config.latent_noise * ramp
        noise = torch.randn(latents.shape, generator=generator, device=batch.device)
        output = model.decoder(latents + level * noise).float()  # type: ignore[operator]
    error = output - batch
    loss = error.abs().mean() + error.square().mean()
    loss = loss + config.latent_penalty * latents.float().square().mean()
    clean = level.flatten() == 0
    mse = (error[clean] / 2).square().mean().item() if clean.any() else float("nan")
    psnr = -10 * math.log10(max(mse, 1e-9))
    return loss, f"loss {loss.item():.4f} psnr {psnr:.1f} std {latents.float().std().item():.2f}"


def _batch(images: np.ndarray, config: AutoencoderConfig, step: int) -> torch.Tensor:
    rng = np.random.default_rng((config.seed, step))
    chosen = images[rng.integers(len(images), size=config.batch_size)]
    batch = torch.from_numpy(chosen).to(config.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def _cosine(step: int, steps: int, warmup: int) -> float:
    ramp = min(1.0, (step + 1) / warmup)
    return ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _resume(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    say(f"resumed at step {state['step']}")
    return int(state["step"])


@torch.no_grad()
def _finish(model: Any, images: np.ndarray, config: AutoencoderConfig, folder: Path) -> Path:
    """Write the model with the measured latent mean and scale in its configuration."""
    batches = (_batch(images, config, 10**7 + i) for i in range(20))
    latents = torch.cat([model.encoder(b).float() for b in batches])
    model.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )
    model.to(memory_format=torch.contiguous_format).save_pretrained(folder)
    kept = {t: f"{a:.1%}" for t, a in reconstruction_accuracy(model, 100, config.seed).items()}
    say(f"autoencoder written to {folder}; correct scenes still correct after it: {kept}")
    return folder


@torch.no_grad()
def reconstruction_accuracy(model: Any, count: int, seed: int = 0) -> dict[str, float]:
    """Per task, the share of correct test scenes that the verifier still accepts after decoding.

    What the autoencoder loses here, no generator can draw and no alignment can mend.
    """
    accuracy = {}
    device = next(model.parameters()).device
    for task in TASKS:
        rng = random.Random(f"reconstruction {seed} {task}")
        specs = [sample_spec(rng, "test", task) for _ in range(count)]
        pictures = np.stack([np.asarray(render(sample_scene(s, rng))) for s in specs])
        pixels = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        output = (model.decoder(model.encoder(pixels)) / 2 + 0.5).clamp(0, 1)
        verdicts = verify(output.permute(0, 2, 3, 1).cpu().numpy(), [caption(s) for s in specs])
        accuracy[task] = sum(v.strict for v in verdicts) / count
    return accuracy
