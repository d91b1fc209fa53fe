"""Tiny random stock pipelines of the other families, for tests: 32-pixel pictures in a moment.

Everything is a stock diffusers / transformers class in the structure of the published models; only
the sizes are ours.  The SD3 one is :func:`mmalign.policies.build.tiny_pipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_lowercase
from typing import Any

import torch

from mmalign.policies.build import SD3Size, build_text_encoder, build_tokenizer

WIDTH = 32  # of every text encoder
SIZE = SD3Size(text_width=WIDTH, text_layers=2)
T5_TOKENS = 64
# The noise schedule and sampling defaults that Stable Diffusion 1.x, 2.x and SDXL share.
SCHEDULE: Mapping[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def tiny_sd(seed: int = 0, **schedule: Any) -> Any:
    """A random ``StableDiffusionPipeline``; ``schedule`` changes its ``DDIMScheduler``."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        return StableDiffusionPipeline(
            unet=_unet(cross_attention_dim=WIDTH),
            vae=_vae(scaling_factor=0.18215),
            scheduler=DDIMScheduler(**{**SCHEDULE, **schedule}),
            text_encoder=_clip(tokenizer),
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sdxl(seed: int = 0, **schedule: Any) -> Any:
    """A random ``StableDiffusionXLPipeline``; ``schedule`` changes its ``DDIMScheduler``."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        unet = _unet(
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
            transformer_layers_per_block=(1, 2),
        )
        return StableDiffusionXLPipeline(
            unet=unet,
            vae=_vae(scaling_factor=0.13025),
            scheduler=DDIMScheduler(**{**SCHEDULE, **schedule}),
            text_encoder=_clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=build_text_encoder(SIZE, tokenizer).eval(),
            tokenizer_2=tokenizer,
            add_watermarker=False,
        )


def tiny_flux(seed: int = 0, distilled: bool = True) -> Any:
    """A random ``FluxPipeline``, with (dev) or without (schnell) a guidance input."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
            guidance_embeds=distilled, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        pipeline = FluxPipeline(
            transformer=transformer.eval(),
            vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if distilled else 1.0,
                use_dynamic_shifting=distilled,
                base_image_seq_len=16,
                max_image_seq_len=256,
                max_shift=1.15,
            ),
            text_encoder=_clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=_t5(),
            tokenizer_2=_t5_tokenizer(),
        )
    pipeline.default_sample_size = 16  # the class fixes 128, for a thousand pixels a side
    return pipeline


def tiny_wan(seed: int = 0, scheduler: Any = None) -> Any:
    """A random ``WanPipeline`` (text to video); the scheduler is UniPC, as published.

    Ask it for videos of 32 pixels a side and 5 frames: ``height=32, width=32, num_frames=5``.
    """
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
            out_channels=16, text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=2,
            rope_max_seq_len=32,
        )  # fmt: skip
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        )  # fmt: skip
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        pipeline = WanPipeline(
            tokenizer=_t5_tokenizer(),
            text_encoder=_t5(),
            transformer=transformer.eval(),
            vae=vae.eval(),
            scheduler=scheduler or UniPCMultistepScheduler(**flow),
        )
    # What sampler.json says of a pipeline in a folder.
    pipeline.recommended = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 32}
    return pipeline


def _unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    ).eval()


def _vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        **options,
    ).eval()


def _clip(tokenizer: Any) -> Any:
    """The text model without the projection that :func:`build_text_encoder` adds."""
    from transformers import CLIPTextModel

    return CLIPTextModel(build_text_encoder(SIZE, tokenizer).config).eval()


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=WIDTH, d_ff=32, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def _t5_tokenizer() -> Any:
    """One token a letter, with the mark of a word's beginning."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    letters = [(f"{mark}{c}", -2.0) for mark in ("▁", "") for c in ascii_lowercase]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=T5_TOKENS)
