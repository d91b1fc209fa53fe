"""Published generators by their sizes: what their configuration files say, and miniatures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A pipeline by its sizes.

    Attributes:
        family: name of the policy family.
        network, vae, scheduler: arguments of the stock classes.
        texts: shapes of one prompt's tensors, without the batch.
    """

    family: Literal["sd", "sdxl", "sd3", "flux"]
    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    texts: Mapping[str, Sequence[int]]

    @property
    def component(self) -> str:
        """The pipeline's name for its denoiser."""
        return "unet" if self.family in ("sd", "sdxl") else "transformer"

    @property
    def network_class(self) -> str:
        """The denoiser's class in diffusers."""
        if self.component == "unet":
            return "UNet2DConditionModel"
        return "SD3Transformer2DModel" if self.family == "sd3" else "FluxTransformer2DModel"

    @property
    def scheduler_class(self) -> str:
        """The scheduler's class in diffusers."""
        flow = self.component == "transformer"
        return "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"

    @property
    def pipeline(self) -> str:
        """The pipeline's class in diffusers."""
        return {
            "sd": "StableDiffusionPipeline",
            "sdxl": "StableDiffusionXLPipeline",
            "sd3": "StableDiffusion3Pipeline",
            "flux": "FluxPipeline",
        }[self.family]

    @property
    def guided(self) -> bool:
        """Whether guidance has an unconditional branch."""
        return self.family != "flux"


_SD_SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
_FLUX_SCHEDULE = {
    "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
    "base_image_seq_len": 256, "max_image_seq_len": 4096,
}  # fmt: skip
_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
_TINY_VAE = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
# The autoencoders of the 16-channel models have no convolutions around the latent.
_NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
_SD3_SCALE = {"scaling_factor": 1.5305, "shift_factor": 0.0609, **_NO_QUANT}
_FLUX_SCALE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, **_NO_QUANT}
_TINY_UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4, "norm_num_groups": 4, "cross_attention_dim": 16,
}  # fmt: skip

# The published denoiser, autoencoder and scheduler configurations, each with a miniature of the
# same structure for tests.
ARCHITECTURES = {
    "sd15": Architecture(
        family="sd",
        network={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        vae={**_VAE, "latent_channels": 4, "scaling_factor": 0.18215},
        scheduler=_SD_SCHEDULE,
        texts={"embeds": (77, 768)},
    ),
    "sd-tiny": Architecture(
        family="sd",
        network=_TINY_UNET,
        vae={**_TINY_VAE, "latent_channels": 4, "scaling_factor": 0.18215},
        scheduler=_SD_SCHEDULE,
        texts={"embeds": (12, 16)},
    ),
    "sdxl": Architecture(
        family="sdxl",
        network={
            "sample_size": 128, "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae={**_VAE, "latent_channels": 4, "scaling_factor": 0.13025},
        scheduler=_SD_SCHEDULE,
        texts={"embeds": (77, 2048), "pooled": (1280,)},
    ),
    "sdxl-tiny": Architecture(
        family="sdxl",
        network={
            **_TINY_UNET, "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 8,
        },
        vae={**_TINY_VAE, "latent_channels": 4, "scaling_factor": 0.13025},
        scheduler=_SD_SCHEDULE,
        texts={"embeds": (12, 16), "pooled": (8,)},
    ),
    "sd3.5-medium": Architecture(
        family="sd3",
        network={
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
            "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
            "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        vae={**_VAE, "latent_channels": 16, **_SD3_SCALE},
        scheduler={"shift": 3.0},
        texts={"embeds": (77 + 256, 4096), "pooled": (2048,)},
    ),
    "sd3-tiny": Architecture(
        family="sd3",
        network={
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4,
            "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
            "joint_attention_dim": 32, "caption_projection_dim": 32,
            "pooled_projection_dim": 32, "pos_embed_max_size": 16,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        vae={**_TINY_VAE, "latent_channels": 4, **_SD3_SCALE},
        scheduler={"shift": 3.0},
        texts={"embeds": (12, 32), "pooled": (32,)},
    ),
    "flux-dev": Architecture(
        family="flux",
        network={
            "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
            "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
        },
        vae={**_VAE, "latent_channels": 16, **_FLUX_SCALE},
        scheduler=_FLUX_SCHEDULE,
        texts={"embeds": (512, 4096), "pooled": (768,)},
    ),
    "flux-tiny": Architecture(
        family="flux",
        network={
            "in_channels": 16, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
            "pooled_projection_dim": 8, "guidance_embeds": True, "axes_dims_rope": (4, 4, 8),
        },
        vae={**_TINY_VAE, "latent_channels": 4, **_FLUX_SCALE},
        scheduler=_FLUX_SCHEDULE,
        texts={"embeds": (12, 16), "pooled": (8,)},
    ),
}  # fmt: skip
