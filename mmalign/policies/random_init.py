"""Published architectures with random weights, for measuring speed and memory.

Nothing is downloaded: the sizes are those of the published configuration, the weights are drawn on
the spot, and the text encoders (the largest part of some pipelines) are replaced by random
embeddings of the right shape. Pictures made this way mean nothing; their cost is the real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.policies.sd3 import SD3Policy
from mmalign.registry import unknown
from mmalign.runtime.seeds import stable_seed
from mmalign.types import Conditioning

PREFIX = "random:"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An SD3-class pipeline by its sizes.

    Attributes:
        transformer: arguments of ``SD3Transformer2DModel``.
        vae: arguments of ``AutoencoderKL`` beyond those that all SD3 autoencoders share.
        text_tokens: length of the prompt embedding: CLIP's tokens and T5's.
        shift: time shift of the flow-matching scheduler.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_tokens: int
    shift: float


ARCHITECTURES = {
    # The published transformer, vae and scheduler configurations of Stable Diffusion 3.5 medium.
    "sd3.5-medium": Architecture(
        transformer={
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
            "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
            "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        text_tokens=77 + 256,
        shift=3.0,
    ),
    # The same structure in miniature, for tests.
    "sd3-tiny": Architecture(
        transformer={
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4,
            "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
            "joint_attention_dim": 32, "caption_projection_dim": 32,
            "pooled_projection_dim": 32, "pos_embed_max_size": 16,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        vae={
            "block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4,
            "norm_num_groups": 4,
        },
        text_tokens=12,
        shift=3.0,
    ),
}  # fmt: skip


class RandomSD3Policy(SD3Policy):
    """An SD3-class policy without text encoders: a prompt's embedding is noise seeded by it.

    Args:
        pipeline: a pipeline whose text encoders are ``None``.
        name: how reports call it.
        text_tokens: length of a prompt embedding.
    """

    def __init__(self, pipeline: Any, *, name: str, text_tokens: int) -> None:
        super().__init__(pipeline, name=name)
        self.text_tokens = text_tokens

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Random embeddings, a function of the prompt's text alone; any length of prompt fits."""
        return Conditioning(self._embed(prompts), self._embed([""] * len(prompts)))

    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        config = self.pipeline.transformer.config
        shapes = {
            "embeds": (self.text_tokens, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        }
        rows = {p: torch.Generator().manual_seed(stable_seed("embedding", p)) for p in prompts}
        drawn = {
            p: {k: torch.randn(s, generator=g) for k, s in shapes.items()} for p, g in rows.items()
        }
        where = {"device": self.device, "dtype": self.pipeline.transformer.dtype}
        return {k: torch.stack([drawn[p][k] for p in prompts]).to(**where) for k in shapes}


def is_random(name: object) -> bool:
    """Whether ``name`` asks for an architecture with random weights (``random:...``)."""
    return isinstance(name, str) and name.startswith(PREFIX)


def load_random(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> RandomSD3Policy:
    """Build ``random:<architecture>`` on ``device`` in ``dtype``; no copy passes through the CPU.

    Raises:
        UnknownNameError: no such architecture; names the nearest.
    """
    found = ARCHITECTURES.get(name.removeprefix(PREFIX))
    if found is None:
        raise unknown("random architecture", name, [PREFIX + n for n in ARCHITECTURES])
    where = torch.device(device)
    with _drawn_on(where, dtype, seed):
        pipeline = _build(found)
    pipeline.to(where, dtype)  # buffers that are made in fp32 whatever the default
    return RandomSD3Policy(pipeline, name=name, text_tokens=found.text_tokens)


def _build(found: Architecture) -> Any:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    blocks = len(found.vae["block_out_channels"])
    vae = {
        "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
        "use_quant_conv": False, "use_post_quant_conv": False,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        **found.vae,
    }  # fmt: skip
    texts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    absent = {n.replace("text_encoder", part): None for n in texts for part in _TEXT_PARTS}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**found.transformer).eval(),
        vae=AutoencoderKL(**vae).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=found.shift),
        **absent,
    )


_TEXT_PARTS = ("text_encoder", "tokenizer")


@contextmanager
def _drawn_on(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """New modules are made on ``device`` in ``dtype`` from ``seed``; global state is restored."""
    before = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            with device:
                yield
        finally:
            torch.set_default_dtype(before)
