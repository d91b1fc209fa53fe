"""Pre-trains the shapes world's flow generator, a stock ``StableDiffusion3Pipeline``.

Rectified flow (Liu et al., 2209.03003): ``x = (1 - sigma) x0 + sigma eps``, the network regresses
``v = eps - x0``; sigma is logit-normal as in SD3 (Esser et al., 2403.03206).  The text encoders
are trained along.  What it shares with the other generator is in :mod:`trainers.pretrain.denoiser`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.policies.build import SD3Size, build_pipeline
from trainers.muon import Muon
from trainers.pretrain.denoiser import (
    Batch,
    DenoiserConfig,
    LatentPool,
    LayoutHead,
    draw,
    export,
    first_pipeline,
    fit,
    make_optimizer,
    tokenize,
)

# What the evaluation of the finished model found best for its cost.
RECOMMENDED = {"steps": 16, "guidance_scale": 2.0, "max_sequence_length": 0}
_TRAINED = ("transformer", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(DenoiserConfig):
    """Dials of :func:`train_generator`; the defaults made the shipped weights."""

    vae: str = "runs/shapes-vae/vae"
    out: str = "runs/shapes-flow"
    steps: int = 3900
    batch_size: int = 96
    layout_block: int = 3


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
    pipeline: Any, head: LayoutHead, batch: Batch, empty: Tensor, config: GeneratorConfig, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Velocity regression plus the layout head; all randomness is a function of the step."""
    latents, layouts, _ = batch
    normal, noise, tokens = draw(batch, empty, config, step)
    sigma = normal.sigmoid()
    at = sigma.view(-1, 1, 1, 1)
    with torch.autocast(latents.device.type, torch.bfloat16):
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


def train_generator(config: GeneratorConfig, size: SD3Size | None = None) -> Path:
    """Pre-train (or resume) the generator; returns the folder of the EMA pipeline."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(config.seed)
    pipeline = first_pipeline(
        config,
        lambda: build_pipeline(
            size or SD3Size(), AutoencoderTiny.from_pretrained(config.vae), config.seed
        ),
    )
    network = pipeline.transformer
    block = network.transformer_blocks[config.layout_block]
    head = LayoutHead(block, network.inner_dim, lambda output: output[1]).to(config.device)
    trained = nn.ModuleDict({n: getattr(pipeline, n) for n in _TRAINED}).requires_grad_(True)
    pool = LatentPool(config, pipeline.vae, pipeline.tokenizer)
    empty = tokenize(pipeline.tokenizer, [""]).to(config.device)
    fit(
        config, trained, head, _optimizer(pipeline, head, config), pool,
        lambda batch, step: flow_loss(pipeline, head, batch, empty, config, step),
    )  # fmt: skip
    return export(pipeline, Path(config.out) / "pipeline", RECOMMENDED)


def _optimizer(pipeline: Any, head: LayoutHead, config: GeneratorConfig) -> Muon:
    """Muon for the blocks' attention and feed-forward matrices."""

    def is_matrix(name: str, p: Tensor) -> bool:
        return name.startswith("transformer_blocks") and p.ndim == 2 and "norm" not in name

    others = [pipeline.text_encoder, pipeline.text_encoder_2, head]
    return make_optimizer(pipeline.transformer, is_matrix, others, config)
