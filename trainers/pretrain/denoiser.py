"""What the pre-training of both small generators shares: pictures, layout head, averages, loop.

Two things make an hour of a small CPU enough for a text-to-image model of this world: Muon on the
matrices, and a layout head, thrown away afterwards: the features in the middle of the network must
tell which shape and colour covers each cell of the clean picture.  That is representation
alignment (REPA, Yu et al., 2410.06940) with the world's ground truth in the place of a vision
encoder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.policies.base import SAMPLER_FILE
from mmalign.policies.build import PROMPT_TOKENS
from mmalign.policies.load import load_policy
from mmalign.runtime.files import atomic_write_json
from mmalign.runtime.log import say
from trainers.muon import Muon
from trainers.pretrain.captions import CaptionTable
from trainers.pretrain.data import ensure_shards, load_captions
from trainers.pretrain.steps import Stateful, checked, resumable_steps

Batch = tuple[Tensor, Tensor, Tensor]  # latents, layouts in [0, 1], token ids


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Dials that both generators have.

    Attributes:
        start: a shipped name or a folder of a pipeline of the same class to go on from, in the
            place of random weights; its autoencoder is kept and ``vae`` unused.
        caption_noise: share of the pictures whose caption is false in one fact (another colour,
            shape, count or relation, an object more or fewer). A generator that learned from
            captions of the web was taught so; 0 for the shipped weights.

    Raises:
        ValueError: ``caption_noise`` outside [0, 1].
    """

    data: str = "shapes-cache"
    vae: str
    out: str
    shards: int = 12
    first_shards: int = 3
    steps: int
    decay_share: float = 0.42
    batch_size: int
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3
    prompt_dropout: float = 0.1
    layout_weight: float = 0.5
    ema_decay: float = 0.9985
    seed: int = 0
    device: str = "cpu"
    save_every: int = 250
    start: str = ""
    caption_noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.caption_noise <= 1:
            raise ValueError(
                f"caption_noise is {self.caption_noise}; it is a share of the pictures, 0 to 1"
            )


class LayoutHead(nn.Module):
    """Reads shape and colour coverage per cell of the picture from a module's output.

    Args:
        module: a part of the network, of whose output ``tokens`` makes ``(B, cells, width)``.
    """

    def __init__(
        self, module: nn.Module, width: int, tokens: Callable[[Any], Tensor], labels: int = 13
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, labels))
        self.tokens = tokens
        self.hidden: Tensor | None = None
        module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.hidden = self.tokens(output)

    def loss(self, layout: Tensor) -> Tensor:
        """Binary cross-entropy against coverage ``(B, cells, cells, labels)`` in [0, 1]."""
        assert self.hidden is not None
        logits = self.net(self.hidden).float()
        target = layout.reshape(logits.shape)
        return nn.functional.binary_cross_entropy_with_logits(logits, target)


class LatentPool:
    """Training pictures as normalised latents, encoded shard by shard and cached on disk."""

    def __init__(self, config: DenoiserConfig, vae: Any, tokenizer: Any) -> None:
        self.config, self.vae, self.tokenizer = config, vae, tokenizer
        self.paths = ensure_shards(Path(config.data), config.shards)
        self.cache = Path(config.out) / "latents"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.latents: list[np.ndarray] = []
        self.layouts: list[np.ndarray] = []
        self.tokens: list[np.ndarray] = []

    def grow_for(self, step: int) -> None:
        """Add the shards that ``step`` draws from.

        Encoding all pictures first would delay the first update: shards join while training runs,
        at steps that depend on the configuration alone.
        """
        c = self.config
        interval = max(1, c.steps // (3 * max(1, c.shards - c.first_shards)))
        while len(self.latents) < min(c.shards, c.first_shards + step // interval):
            self._grow()

    def _grow(self) -> None:
        index = len(self.latents)
        path = self.cache / f"{index:04d}.npz"
        if not path.exists():
            self._encode(index, path)
        shard = np.load(path)
        self.latents.append(shard["latents"])
        self.layouts.append(shard["layouts"])
        self.tokens.append(shard["tokens"])

    @torch.no_grad()
    def _encode(self, index: int, path: Path) -> None:
        c = self.config
        shard = np.load(self.paths[index])
        shift, scale = self.vae.config.shift_factor, self.vae.config.scaling_factor
        parts = []
        for block in np.array_split(shard["images"], 80):
            pixels = torch.from_numpy(block).permute(0, 3, 1, 2).to(c.device)
            pixels = pixels.to(memory_format=torch.channels_last).float() / 127.5 - 1
            with torch.autocast(c.device, torch.bfloat16):
                latents = self.vae.encoder(pixels)
            parts.append(((latents.float() - shift) * scale).half().cpu().numpy())
        captions = load_captions(self.paths[index])
        if c.caption_noise:
            rng = random.Random(f"shapes caption noise {c.seed} {index}")
            captions = CaptionTable().mislabelled(captions, c.caption_noise, rng)
        tokens = tokenize(self.tokenizer, captions).to(torch.int16)
        np.savez(
            path, latents=np.concatenate(parts), layouts=shard["layouts"], tokens=tokens.numpy()
        )

    def batch(self, step: int) -> Batch:
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


def first_pipeline(config: DenoiserConfig, build: Callable[[], Any]) -> Any:
    """What training starts from, in fp32 on its device: ``config.start``, or what is built."""
    if config.start:
        policy: Any = load_policy(config.start, device=config.device, dtype=torch.float32)
        return policy.pipeline
    return build().to(config.device)


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids ``(B, PROMPT_TOKENS)``, padded exactly as the stock pipelines pad."""
    return torch.as_tensor(
        tokenizer(captions, padding="max_length", max_length=PROMPT_TOKENS).input_ids
    )


def draw(
    batch: Batch, empty: Tensor, config: DenoiserConfig, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Randomness of a step, a function of its number: ``(B,)`` normal, noise, dropped-out tokens.

    The first decides the noise levels; ``empty`` are the tokens of the empty prompt.
    """
    latents, _, tokens = batch
    device, n = latents.device, len(latents)
    g = torch.Generator(device).manual_seed(config.seed * 1_000_003 + step)
    normal = torch.randn(n, generator=g, device=device)
    noise = torch.randn(latents.shape, generator=g, device=device)
    drop = torch.rand(n, generator=g, device=device) < config.prompt_dropout
    return normal, noise, torch.where(drop[:, None], empty, tokens)


class Rates(Protocol):
    """A configuration with the two learning rates."""

    @property
    def muon_lr(self) -> float:
        """Of the matrices."""

    @property
    def adam_lr(self) -> float:
        """Of everything else."""


def make_optimizer(
    network: nn.Module, is_matrix: Callable[[str, Tensor], bool], others: list[nn.Module],
    config: Rates,
) -> Muon:  # fmt: skip
    """Muon for the parameters of ``network`` that are matrices, Adam for everything else."""
    named = list(network.named_parameters())
    rest = [p for name, p in named if not is_matrix(name, p)]
    for module in others:
        rest += list(module.parameters())
    matrices = [p for name, p in named if is_matrix(name, p)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": rest, "adam": True},
    ]
    return Muon(groups, lr=config.muon_lr, adam_lr=config.adam_lr)


def schedule(step: int, config: DenoiserConfig) -> float:
    """Warm-up, constant, then linear decay over the last ``decay_share`` of the steps."""
    left = (config.steps - step) / (config.decay_share * config.steps)
    return min(1.0, (step + 1) / 200, max(left, 0.0))


class Ema:
    """A moving average of a module's weights, faster in the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Follow the weights after ``step``."""
        decay = min(self.decay, (step + 1) / (step + 10))
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1 - decay)
            else:
                self.average[key].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages."""
        return self.average

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Undo :meth:`state_dict`."""
        for key, value in state_dict.items():
            self.average[key].copy_(value)


def fit(
    config: DenoiserConfig, trained: nn.Module, head: LayoutHead, optimizer: Muon,
    pool: LatentPool, loss_of: Callable[[Batch, int], tuple[Tensor, dict[str, float]]],
) -> None:  # fmt: skip
    """Train (or resume); leaves the moving average in ``trained``."""
    ema = Ema(trained, config.ema_decay)
    parts: dict[str, Stateful] = {
        "model": trained, "head": head, "optimizer": optimizer, "ema": ema
    }  # fmt: skip
    path = Path(config.out) / "state.pt"
    for step in resumable_steps(path, parts, config.steps, config.save_every):
        pool.grow_for(step)
        for group in optimizer.param_groups:
            group["scale"] = schedule(step, config)
        loss, metrics = loss_of(pool.batch(step), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        ema.update(trained, step)
        if (step + 1) % 50 == 0:
            seen = f"{checked(metrics, 'muon_lr or adam_lr')} shards {len(pool.latents)}"
            say(f"step {step + 1}/{config.steps} {seen}")
    trained.load_state_dict(ema.state_dict())


def export(pipeline: Any, folder: Path, sampler: Mapping[str, Any]) -> Path:
    """Write the finished pipeline as it is shipped: fp16 safetensors and the sampler file."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    atomic_write_json(folder / SAMPLER_FILE, dict(sampler))
    for path in [folder / "model_index.json", *folder.rglob("config.json")]:
        settings = json.loads(path.read_text(encoding="utf-8"))
        # Where the weights once lay on this machine is nobody's business.
        settings.pop("_name_or_path", None)
        atomic_write_json(path, settings)
    say(f"generator written to {folder}")
    return folder
