"""Policy for the Stable Diffusion 3 / 3.5 class: ``diffusers.StableDiffusion3Pipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.policies.base import SAMPLER_FILE
from mmalign.policies.flow import FlowPolicy
from mmalign.types import Conditioning

__all__ = ["SAMPLER_FILE", "SD3Policy"]


class SD3Policy(FlowPolicy):
    """Flow-matching policy over the components of a stock SD3-class pipeline.

    Args:
        pipeline: the user's own pipeline object; it is used in place, never copied.
        name: how reports call it; defaults to where the pipeline was loaded from.
        max_sequence_length: T5 tokens, also the zero tokens that the pipeline appends when it has
            no T5. ``None`` takes the recommended sampler's, else diffusers' default of 256.
    """

    family = "sd3"

    def __init__(
        self, pipeline: Any, *, name: str = "", max_sequence_length: int | None = None
    ) -> None:
        super().__init__(pipeline, name=name, steps=28, guidance_scale=4.5)
        default = self.recommended.get("max_sequence_length", 256)
        self.max_sequence_length = default if max_sequence_length is None else max_sequence_length

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Layers whose output the architecture discards: no gradient can ever reach them.

        The last joint block drops its text stream, so its text queries are computed for nothing.
        """
        last = f"transformer_blocks.{len(self.pipeline.transformer.transformer_blocks) - 1}.attn"
        return (f"{last}.add_q_proj", f"{last}.norm_added_q")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts and the empty prompt, on the policy's device.

        Raises:
            ValueError: a prompt has more tokens than a text encoder takes.
        """
        self.check_length(prompts, self.limits())
        embeds, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            negative_prompt=[""] * len(prompts),
            do_classifier_free_guidance=True,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning(
            {"embeds": embeds, "pooled": pooled},
            {"embeds": negative, "pooled": negative_pooled},
        )

    def sigmas(self, steps: int) -> Tensor:
        """The pipeline scheduler's own grid, ``(steps + 1,)``, ending at 0."""
        if not self.pipeline.scheduler.config.get("use_dynamic_shifting"):
            return self.grid(steps)
        _, height, width = self.latent_shape
        patch = self.pipeline.transformer.config.patch_size
        tokens = (height // patch) * (width // patch)
        return self.grid(steps, mu=self.dynamic_shift(tokens, max_shift=1.16))

    def call(self, x: Tensor, time: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Velocity ``eps - x0``, ``(B, C, h, w)``."""
        return self.pipeline.transformer(  # type: ignore[no-any-return]
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=conditioning["embeds"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0]

    def limits(self) -> list[tuple[Any, int]]:
        """CLIP's tokenizer, and T5's where there is one."""
        limits = [(self.pipeline.tokenizer, self.pipeline.tokenizer_max_length)]
        if self.pipeline.tokenizer_3 is not None:
            limits.append((self.pipeline.tokenizer_3, self.max_sequence_length))
        return limits
