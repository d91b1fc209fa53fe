"""Policy for the Stable Diffusion 1.x / 2.x class: ``diffusers.StableDiffusionPipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.policies.diffusion import DiffusionPolicy
from mmalign.types import Conditioning


class SDPolicy(DiffusionPolicy):
    """Diffusion policy over the components of a stock SD1.x / SD2.x pipeline.

    The pipeline's safety checker is not run: it would put black pictures before the reward.

    Args:
        pipeline: the user's own pipeline object; it is used in place, never copied.
        name: how reports call it; defaults to where the pipeline was loaded from.
    """

    family = "sd"

    def __init__(self, pipeline: Any, *, name: str = "") -> None:
        super().__init__(pipeline, name=name, steps=50, guidance_scale=7.5)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the pipeline's pictures in pixels."""
        size, scale = self.pipeline.unet.config.sample_size, self.pipeline.vae_scale_factor
        height, width = (size, size) if isinstance(size, int) else size
        return height * scale, width * scale

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts and the empty prompt, on the policy's device.

        Raises:
            ValueError: a prompt has more tokens than the text encoder takes.
        """
        self.check_length(prompts, self.limits())
        embeds, negative = self.pipeline.encode_prompt(
            prompt=list(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        return Conditioning({"embeds": embeds}, {"embeds": negative})

    def limits(self) -> list[tuple[Any, int]]:
        """The tokenizer."""
        return [(self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length)]

    def call(self, x: Tensor, time: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Noise or velocity, as the scheduler's ``prediction_type`` says, ``(B, C, h, w)``."""
        return self.pipeline.unet(  # type: ignore[no-any-return]
            x, time, encoder_hidden_states=conditioning["embeds"], return_dict=False
        )[0]
