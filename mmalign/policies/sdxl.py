"""Policy for the Stable Diffusion XL class: ``diffusers.StableDiffusionXLPipeline``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.policies.diffusion import DiffusionPolicy
from mmalign.types import Conditioning


class SDXLPolicy(DiffusionPolicy):
    """Diffusion policy over the components of a stock SDXL base pipeline.

    Two text encoders, a pooled embedding, and the picture's size as an input of the network: the
    original and the target size are those of the picture, the crop begins at its corner.

    Args:
        pipeline: the user's own pipeline object; it is used in place, never copied.
        name: how reports call it; defaults to where the pipeline was loaded from.
    """

    family = "sdxl"

    def __init__(self, pipeline: Any, *, name: str = "") -> None:
        super().__init__(pipeline, name=name, steps=50, guidance_scale=5.0)
        self._decoder: Any = None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts and the unconditional branch, on the policy's device.

        The latter is zeros where the pipeline says ``force_zeros_for_empty_prompt``, as published.

        Raises:
            ValueError: a prompt has more tokens than a text encoder takes.
        """
        self.check_length(prompts, self.limits())
        embeds, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, do_classifier_free_guidance=True
        )
        return Conditioning(
            {"embeds": embeds, "pooled": pooled},
            {"embeds": negative, "pooled": negative_pooled},
        )

    def limits(self) -> list[tuple[Any, int]]:
        """Both tokenizers, or the one there is."""
        tokenizers = [t for t in (self.pipeline.tokenizer, self.pipeline.tokenizer_2) if t]
        return [(t, t.model_max_length) for t in tokenizers]

    def call(self, x: Tensor, time: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Noise or velocity, as the scheduler's ``prediction_type`` says, ``(B, C, h, w)``."""
        embeds, scale = conditioning["embeds"], self.pipeline.vae_scale_factor
        size = (x.shape[-2] * scale, x.shape[-1] * scale)
        added = {
            "text_embeds": conditioning["pooled"],
            "time_ids": embeds.new_tensor([*size, 0, 0, *size]).expand(len(x), 6),
        }
        return self.pipeline.unet(  # type: ignore[no-any-return]
            x, time, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False
        )[0]

    def decoder(self) -> Any:
        """The autoencoder; in fp32 where fp16 overflows in it (``force_upcast``).

        The pipeline casts its own back and forth, which would break a backward pass through the
        picture; here an fp32 copy is kept and the pipeline's stays as it is.
        """
        vae = self.pipeline.vae
        if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
            return vae
        if self._decoder is None or self._decoder.device != vae.device:
            self._decoder = copy.deepcopy(vae).float()
        return self._decoder
