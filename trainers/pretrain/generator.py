"""Pre-trains the shapes world's flow generator, a stock ``StableDiffusion3Pipeline``.

Rectified flow (Liu et al., 2209.03003): ``x = (1 - sigma) x0 + sigma eps``, the network regresses
``v = eps - x0``; sigma is logit-normal as in SD3 (Esser et al., 2403.03206).  The text encoders
are trained along.  Two additions make an hour of two CPU cores enough:

* Muon on the matrices of the blocks.
* A layout head, thrown away afterwards: the image tokens in the middle of the network must tell
  which shape and colour covers each cell of the clean picture.  It is representation alignment
  (REPA, Yu et al., 2410.06940) with the world's ground truth in the place of a vision encoder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.policies.build import PROMPT_TOKENS, SD3Size, build_pipeline
from mmalign.policies.sd3 import SAMPLER_FILE
from mmalign.runtime.files import atomic_path, atomic_write_json
from mmalign.runtime.log import say
from trainers.muon import Muon
from trainers.pretrain.data import ensure_shards, load_captions


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Dials of :func:`train_generator`; the defaults made the shipped weights."""

    data: str = "shapes-cache"
    vae: str = "runs/shapes-vae/vae"
    out: str = "runs/shapes-flow"
    shards: int = 12
    first_shards: int = 3
    steps: int = 3900
    decay_share: float = 0.42
    batch_size: int = 96
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3
    prompt_dropout: float = 0.1
    layout_weight: float = 0.5
    layout_block: int = 3
    ema_decay: float = 0.9985
    seed: int = 0
    device: str = "cpu"
    save_every: int = 250


class LayoutHead(nn.Module):
    """Reads shape and colour coverage per image token from the hidden states of one block."""

    def __init__(self, transformer: Any, block: int, labels: int = 13) -> None:
        super().__init__()
        width = transformer.inner_dim
        self.net = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, labels))
        self.hidden: Tensor | None = None
        transformer.transformer_blocks[block].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self.hidden = output[1]

    def loss(self, layout: Tensor) -> Tensor:
        """Binary cross-entropy against coverage ``(B, cells, cells, labels)`` in [0, 1]."""
        assert self.hidden is not None
        logits = self.net(self.hidden).float()
        target = layout.reshape(logits.shape)
        return nn.functional.binary_cross_entropy_with_logits(logits, target)


class LatentPool:
    """Training pictures as normalised latents, encoded shard by shard and cached on disk."""

    def __init__(self, config: GeneratorConfig, vae: Any, tokenizer: Any) -> None:
        self.config, self.vae, self.tokenizer = config, vae, tokenizer
        self.paths = ensure_shards(Path(config.data), config.shards)
        self.cache = Path(config.out) / "latents"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.latents: list[np.ndarray] = []
        self.layouts: list[np.ndarray] = []
        self.tokens: list[np.ndarray] = []

    def grow(self) -> None:
        """Add the next shard, if any is left."""
        index = len(self.latents)
        if index >= self.config.shards:
            return
        path = self.cache / f"{index:04d}.npz"
        if not path.exists():
            self._encode(index, path)
        shard = np.load(path)
        self.latents.append(shard["latents"])
        self.layouts.append(shard["layouts"])
        self.tokens.append(shard["tokens"])

    @torch.no_grad()
    def _encode(self, index: int, path: Path) -> None:
        shard = np.load(self.paths[index])
        shift, scale = self.vae.config.shift_factor, self.vae.config.scaling_factor
        parts = []
        for block in np.array_split(shard["images"], 80):
            pixels = torch.from_numpy(block).permute(0, 3, 1, 2).to(self.config.device)
            pixels = pixels.to(memory_format=torch.channels_last).float() / 127.5 - 1
            with torch.autocast(self.config.device, torch.bfloat16):
                latents = self.vae.encoder(pixels)
            parts.append(((latents.float() - shift) * scale).half().cpu().numpy())
        tokens = tokenize(self.tokenizer, load_captions(self.paths[index])).to(torch.int16)
        np.savez(
            path, latents=np.concatenate(parts), layouts=shard["layouts"], tokens=tokens.numpy()
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, layouts in [0, 1] and token ids of one batch, a function of the step alone."""
        rng = np.random.default_rng((self.config.seed, step))
        shard = rng.integers(len(self.latents), size=self.config.batch_size)
        row = rng.integers(len(self.latents[0]), size=self.config.batch_size)
        pick = list(zip(shard, row, strict=True))
        latents = torch.from_numpy(np.stack([self.latents[s][r] for s, r in pick])).float()
        layouts = torch.from_numpy(np.stack([self.layouts[s][r] for s, r in pick])).float() / 255
        tokens = torch.from_numpy(np.stack([self.tokens[s][r] for s, r in pick])).long()
        device = self.config.device
        return latents.to(device), layouts.to(device), tokens.to(device)


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids ``(B, PROMPT_TOKENS)``, padded exactly as the stock pipeline pads."""
    return torch.as_tensor(
        tokenizer(captions, padding="max_length", max_length=PROMPT_TOKENS).input_ids
    )


def encode_text(pipeline: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence ``(B, L, D)`` and pooled ``(B, D)`` embeddings, as the stock pipeline forms them.

    The stock pipeline appends zero tokens in the place of T5; with ``max_sequence_length=0``, how
    this model is meant to be used, there are none.
    """
    outs = [
        encoder(tokens, output_hidden_states=True)
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    ]
    sequence = torch.cat([o.hidden_states[-2] for o in outs], dim=-1)
    return sequence, torch.cat([o[0] for o in outs], dim=-1)


def flow_loss(
    pipeline: Any, head: LayoutHead, batch: tuple[Tensor, Tensor, Tensor], empty: Tensor,
    config: GeneratorConfig, step: int,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Velocity regression plus the layout head; all randomness is a function of the step."""
    latents, layouts, tokens = batch
    device = latents.device
    g = torch.Generator(device).manual_seed(config.seed * 1_000_003 + step)
    n = len(latents)
    sigma = torch.randn(n, generator=g, device=device).sigmoid()
    noise = torch.randn(latents.shape, generator=g, device=device)
    drop = torch.rand(n, generator=g, device=device) < config.prompt_dropout
    tokens = torch.where(drop[:, None], empty, tokens)
    at = sigma.view(-1, 1, 1, 1)
    with torch.autocast(device.type, torch.bfloat16):
        sequence, pooled = encode_text(pipeline, tokens)
        velocity = pipeline.transformer(
            hidden_states=(1 - at) * latents + at * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        layout = head.loss(layouts)
    flow = (velocity.float() - (noise - latents)).square().mean()
    loss = flow + config.layout_weight * layout
    return loss, {"flow": flow.item(), "layout": layout.item()}


def make_optimizer(pipeline: Any, head: LayoutHead, config: GeneratorConfig) -> Muon:
    """Muon for the blocks' attention and feed-forward matrices, Adam for everything else."""
    blocks: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in pipeline.transformer.named_parameters():
        matrix = name.startswith("transformer_blocks") and p.ndim == 2 and "norm" not in name
        (blocks if matrix else rest).append(p)
    for module in (pipeline.text_encoder, pipeline.text_encoder_2, head):
        rest += list(module.parameters())
    groups: list[dict[str, Any]] = [
        {"params": blocks, "weight_decay": 0.01},
        {"params": rest, "adam": True},
    ]
    return Muon(groups, lr=config.muon_lr, adam_lr=config.adam_lr)


def schedule(step: int, config: GeneratorConfig) -> float:
    """Warm-up, constant, then linear decay over the last ``decay_share`` of the steps."""
    left = (config.steps - step) / (config.decay_share * config.steps)
    return min(1.0, (step + 1) / 200, max(left, 0.0))


def train_generator(config: GeneratorConfig, size: SD3Size | None = None) -> Path:
    """Pre-train (or resume) the generator; returns the folder of the EMA pipeline."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(config.seed)
    vae = AutoencoderTiny.from_pretrained(config.vae).to(config.device)
    pipeline = build_pipeline(size or SD3Size(), vae, config.seed)
    pipeline.to(config.device)
    head = LayoutHead(pipeline.transformer, config.layout_block).to(config.device)
    trained = nn.ModuleDict({n: getattr(pipeline, n) for n in _TRAINED})
    ema = {k: v.detach().clone() for k, v in trained.state_dict().items()}
    optimizer = make_optimizer(pipeline, head, config)
    pool = LatentPool(config, vae, pipeline.tokenizer)
    empty = tokenize(pipeline.tokenizer, [""]).to(config.device)
    for step in _steps(config, trained, head, ema, optimizer, pool):
        for group in optimizer.param_groups:
            group["scale"] = schedule(step, config)
        loss, metrics = flow_loss(pipeline, head, pool.batch(step), empty, config, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        _update_ema(ema, trained, min(config.ema_decay, (step + 1) / (step + 10)))
        if (step + 1) % 50 == 0:
            seen = f"{_format(metrics)} shards {len(pool.latents)}"
            say(f"flow step {step + 1}/{config.steps} {seen}")
    trained.load_state_dict(ema)
    return export(pipeline, Path(config.out) / "pipeline")


def export(pipeline: Any, folder: Path) -> Path:
    """Write the finished pipeline as it is shipped: fp16 safetensors and the sampler file."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    atomic_write_json(folder / SAMPLER_FILE, RECOMMENDED)
    for path in folder.rglob("config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        # Where the weights once lay on this machine is nobody's business.
        settings.pop("_name_or_path", None)
        atomic_write_json(path, settings)
    say(f"generator written to {folder}")
    return folder


# What the evaluation of the finished model found best for its cost.
RECOMMENDED = {"steps": 16, "guidance_scale": 2.0, "max_sequence_length": 0}
_TRAINED = ("transformer", "text_encoder", "text_encoder_2")


def _steps(
    config: GeneratorConfig, trained: nn.Module, head: nn.Module, ema: dict[str, Tensor],
    optimizer: Muon, pool: LatentPool,
) -> Iterator[int]:  # fmt: skip
    """Step numbers, resuming from and saving to ``state.pt``; grows the pool along the way."""
    path = Path(config.out) / "state.pt"
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=config.device)
        trained.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        for key, value in state["ema"].items():
            ema[key].copy_(value)
        step = int(state["step"])
        say(f"resumed at step {step}")
    first, start = step, time.time()
    # Encoding all pictures first would delay the first update: shards join while training runs.
    interval = max(1, config.steps // (3 * max(1, config.shards - config.first_shards)))
    while step < config.steps:
        while len(pool.latents) < min(config.shards, config.first_shards + step // interval):
            pool.grow()
        yield step
        step += 1
        if step % config.save_every == 0 or step == config.steps:
            rate = (step - first) * config.batch_size / (time.time() - start)
            say(f"saved at step {step}, {rate:.0f} img/s")
            state = {"model": trained.state_dict(), "head": head.state_dict(), "ema": ema}
            state |= {"optimizer": optimizer.state_dict(), "step": step}
            with atomic_path(path) as partial:
                torch.save(state, partial)


@torch.no_grad()
def _update_ema(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            ema[key].lerp_(value, 1 - decay)
        else:
            ema[key].copy_(value)


def _format(metrics: dict[str, float]) -> str:
    if not all(math.isfinite(v) for v in metrics.values()):
        raise FloatingPointError(f"pre-training diverged: {metrics}; lower muon_lr or adam_lr")
    return " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
