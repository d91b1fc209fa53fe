"""Pre-trains the shapes world's epsilon generator, a stock ``StableDiffusionPipeline``.

The noise schedule of Stable Diffusion 1.x (``x = alpha x0 + sigma eps``, scaled-linear betas); the
network regresses ``eps`` (Ho et al., 2006.11239).  Two departures from drawing times uniformly and
counting errors of ``eps`` alike, which would leave little weight to high noise, where a picture's
layout is decided:

* times are drawn so that the log of the signal-to-noise ratio is normal, which is what logit-normal
  levels are for a flow model;
* the error counts by ``1 / alpha^2``, capped: that is the error of the ``v`` that the prediction
  stands for (Salimans and Ho, 2202.00512).

The text encoder is trained along.  What it shares with the other generator is in
:mod:`trainers.pretrain.denoiser`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.assets import asset
from mmalign.policies.build import SD3Size, build_text_encoder, build_tokenizer
from mmalign.policies.tiny import SCHEDULE
from mmalign.sampling.process import noised
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
RECOMMENDED = {"steps": 20, "guidance_scale": 2.0}
_TRAINED = ("unet", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(DenoiserConfig):
    """Dials of :func:`train_diffusion`; the defaults made the shipped weights.

    Attributes:
        vae: a folder; empty is the shipped autoencoder.
        snr_mean, snr_std: of the log of the signal-to-noise ratio of the times drawn.
        weight_max: cap of ``1 / alpha^2``.
    """

    vae: str = ""
    out: str = "runs/shapes-sd"
    steps: int = 3000
    batch_size: int = 64
    snr_mean: float = -0.5
    snr_std: float = 2.0
    weight_max: float = 50.0


@dataclass(frozen=True, kw_only=True)
class UNetSize:
    """Sizes of a small network of the Stable Diffusion 1.x class."""

    channels: tuple[int, ...] = (48, 128)  # attention at the last level, where cells are 8 x 8
    heads: int = 4
    text_width: int = 96
    text_layers: int = 3
    latent_size: int = 16
    latent_channels: int = 4


def build_unet(size: UNetSize) -> Any:
    """A small random ``UNet2DConditionModel``."""
    from diffusers import UNet2DConditionModel

    plain = len(size.channels) - 1
    return UNet2DConditionModel(
        sample_size=size.latent_size,
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        block_out_channels=size.channels,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        layers_per_block=1,
        attention_head_dim=size.heads,  # what the class calls so is the number of heads
        cross_attention_dim=size.text_width,
        norm_num_groups=16,
    )


def build_diffusion_pipeline(size: UNetSize, vae: Any, seed: int = 0) -> Any:
    """Assemble a random stock ``StableDiffusionPipeline`` (no safety checker) around ``vae``."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text = SD3Size(text_width=size.text_width, text_layers=size.text_layers)
        return StableDiffusionPipeline(
            unet=build_unet(size),
            vae=vae,
            scheduler=DDIMScheduler(**SCHEDULE),
            text_encoder=CLIPTextModel(build_text_encoder(text, tokenizer).config),
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def draw_times(normal: Tensor, abar: Tensor, config: DiffusionConfig) -> Tensor:
    """Integer times ``(B,)`` whose log signal-to-noise ratio is the scaled ``normal``, cut off.

    Args:
        abar: ``alpha^2`` of each time, ``(T,)``, descending.
    """
    ratio = (abar / (1 - abar)).log()
    wanted = config.snr_mean + config.snr_std * normal
    return torch.searchsorted(-ratio, -wanted).clamp_max(len(abar) - 1)


def diffusion_loss(
    pipeline: Any, head: LayoutHead, batch: Batch, empty: Tensor, config: DiffusionConfig, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Noise regression plus the layout head; all randomness is a function of the step."""
    latents, layouts, _ = batch
    normal, noise, tokens = draw(batch, empty, config, step)
    abar = pipeline.scheduler.alphas_cumprod.to(latents.device)
    times = draw_times(normal, abar, config)
    sigma = (1 - abar[times].double()).sqrt()
    with torch.autocast(latents.device.type, torch.bfloat16):
        embeds = pipeline.text_encoder(tokens)[0]
        x = noised("epsilon", latents, noise, sigma)
        predicted = pipeline.unet(x, times, encoder_hidden_states=embeds, return_dict=False)[0]
        layout = head.loss(layouts)
    error = (predicted.float() - noise).square().flatten(1).mean(1)
    weight = (1 / abar[times]).clamp_max(config.weight_max)
    matching = (weight * error).mean()
    loss = matching + config.layout_weight * layout
    metrics = {"noise": error.mean().item(), "weighted": matching.item(), "layout": layout.item()}
    return loss, metrics


def train_diffusion(config: DiffusionConfig, size: UNetSize | None = None) -> Path:
    """Pre-train (or resume) the generator; returns the folder of the EMA pipeline."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    torch.manual_seed(config.seed)
    pipeline = first_pipeline(config, lambda: _new_pipeline(config, size or UNetSize()))
    unet = pipeline.unet
    # At so few tokens plain products are faster on a CPU: a quarter of the backward pass is saved.
    unet.set_attn_processor(AttnProcessor())
    head = LayoutHead(unet.mid_block, unet.config.block_out_channels[-1], _cells).to(config.device)
    trained = nn.ModuleDict({n: getattr(pipeline, n) for n in _TRAINED})
    trained.requires_grad_(True).train()
    pool = LatentPool(config, pipeline.vae, pipeline.tokenizer)
    empty = tokenize(pipeline.tokenizer, [""]).to(config.device)
    fit(
        config, trained, head, _optimizer(pipeline, head, config), pool,
        lambda batch, step: diffusion_loss(pipeline, head, batch, empty, config, step),
    )  # fmt: skip
    unet.set_attn_processor(AttnProcessor2_0())
    return export(pipeline, Path(config.out) / "pipeline", RECOMMENDED)


def _new_pipeline(config: DiffusionConfig, size: UNetSize) -> Any:
    from diffusers import AutoencoderTiny

    folder = config.vae or str(asset("shapes-flow/vae"))
    vae = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32)
    # Stock Stable Diffusion scales latents and never shifts them.
    vae.register_to_config(shift_factor=0.0)
    return build_diffusion_pipeline(size, vae, config.seed)


def _cells(features: Tensor) -> Tensor:
    """``(B, C, h, w)`` to ``(B, h * w, C)``."""
    return features.flatten(2).transpose(1, 2)


def _optimizer(pipeline: Any, head: LayoutHead, config: DiffusionConfig) -> Muon:
    """Muon for the blocks' kernels and matrices."""
    blocks = ("down_blocks", "mid_block", "up_blocks")

    def is_matrix(name: str, p: Tensor) -> bool:
        return name.startswith(blocks) and p.ndim >= 2

    return make_optimizer(pipeline.unet, is_matrix, [pipeline.text_encoder, head], config)
