"""Policy for the Wan class (text to video): ``diffusers.WanPipeline``.

Latents are ``(B, C, T', h, w)``: a causal autoencoder keeps the first frame and joins ``s`` later
ones into one, so a video has ``T = s (T' - 1) + 1`` frames (``s = 4``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.policies.flow import FlowPolicy
from mmalign.runtime.log import say
from mmalign.types import Conditioning, Media, MediaKind


class WanPolicy(FlowPolicy):
    """Flow-matching policy over the components of a stock Wan 2.1 class pipeline.

    Args:
        pipeline: the user's own pipeline object; it is used in place, never copied.
        name: how reports call it; defaults to where the pipeline was loaded from.
        num_frames: of each video; ``None`` takes the recommended number, else diffusers' 81.
        max_sequence_length: T5 tokens; ``None`` takes the recommended number, else 512.

    Raises:
        ValueError: another scheduler than Euler's (see :func:`use_euler`), a pipeline of two
            networks or of per-token times (Wan 2.2), or a number of frames that the autoencoder
            cannot make.
    """

    family = "wan"
    media: MediaKind = "video"

    def __init__(
        self,
        pipeline: Any,
        *,
        name: str = "",
        num_frames: int | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        if pipeline.transformer_2 is not None or pipeline.config.get("expand_timesteps"):
            raise ValueError(
                "the wan policy samples one network at one time for the whole video (Wan 2.1); "
                "pipelines of two networks or of per-token times (Wan 2.2) are not supported"
            )
        super().__init__(pipeline, name=name, steps=50, guidance_scale=5.0)
        told = {**getattr(pipeline, "recommended", {}), **self.recommended}
        self.num_frames = num_frames or told.get("num_frames", 81)
        self.max_sequence_length = max_sequence_length or told.get("max_sequence_length", 512)
        step = pipeline.vae_scale_factor_temporal
        if self.num_frames < 1 or (self.num_frames - 1) % step:
            below = max(0, (self.num_frames - 1) // step) * step + 1
            raise ValueError(
                f"{self.name} makes videos of 1, {1 + step}, {1 + 2 * step}, ... frames, not of "
                f"{self.num_frames}; use num_frames {below} or {below + step}"
            )

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of diffusers' own defaults, or of the pipeline's own recommendation."""
        told = getattr(self.pipeline, "recommended", {})
        return told.get("height", 480), told.get("width", 832)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, frames, height and width of the latents of one video."""
        space, time = (
            self.pipeline.vae_scale_factor_spatial,
            self.pipeline.vae_scale_factor_temporal,
        )
        size = self.sampler.height // space, self.sampler.width // space
        channels = int(self.pipeline.transformer.config.in_channels)
        return (channels, (self.num_frames - 1) // time + 1, *size)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts and the empty prompt, on the policy's device.

        Raises:
            ValueError: a prompt has more tokens than the text encoder takes.
        """
        self.check_length(prompts, self.limits())
        embeds, negative = self.pipeline.encode_prompt(
            prompt=list(prompts),
            negative_prompt=[""] * len(prompts),
            do_classifier_free_guidance=True,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        dtype = self.pipeline.transformer.dtype
        return Conditioning({"embeds": embeds.to(dtype)}, {"embeds": negative.to(dtype)})

    def sigmas(self, steps: int) -> Tensor:
        """The scheduler's own grid, ``(steps + 1,)``, ending at 0."""
        return self.grid(steps)

    def call(self, x: Tensor, time: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Velocity ``eps - x0``, ``(B, C, T', h, w)``."""
        return self.pipeline.transformer(  # type: ignore[no-any-return]
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=conditioning["embeds"],
            return_dict=False,
        )[0]

    def pixels(self, latents: Tensor) -> Tensor:
        """Videos before they are clamped, ``(B, T, 3, H, W)`` fp32; differentiable."""
        vae = self.decoder()
        mean, std = self._statistics(latents)
        pixels = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        return pixels.transpose(1, 2).float() / 2 + 0.5  # type: ignore[no-any-return]

    def encode_image(self, media: Media) -> Tensor:
        """Clean latents ``(B, C, T', h, w)`` fp32 of videos in [0, 1]; no gradient.

        Raises:
            ValueError: pictures, or videos of another size or length.
        """
        wanted = (self.num_frames, 3, self.sampler.height, self.sampler.width)
        if media.kind != "video" or tuple(media.data.shape[1:]) != wanted:
            got = " x ".join(map(str, media.data.shape[1:]))
            raise ValueError(
                f"{self.name} takes videos of {' x '.join(map(str, wanted))} (frames, channels, "
                f"height, width), got one {media.kind} of {got}"
            )
        vae = self.decoder()
        with torch.no_grad():
            found = vae.encode(media.data.to(self.device, vae.dtype).transpose(1, 2) * 2 - 1)
        latents = found.latent_dist.mode().float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std  # type: ignore[no-any-return]

    def limits(self) -> list[tuple[Any, int]]:
        """T5's tokenizer."""
        return [(self.pipeline.tokenizer, self.max_sequence_length)]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel of the autoencoder's latents."""
        config = self.pipeline.vae.config
        mean, std = (
            like.new_tensor(v).view(1, -1, 1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )
        return mean, std


def use_euler(pipeline: Any) -> None:
    """Give a freshly loaded pipeline Euler's scheduler of the same shift, and say so.

    Published checkpoints name UniPC, a multistep solver without transition densities; the noise
    process (``x = (1 - sigma) x0 + sigma eps``) and the shift of its grid are the same.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    kind, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    if kind == "FlowMatchEulerDiscreteScheduler" or not config.get("use_flow_sigmas"):
        return
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps, shift=config.get("flow_shift", 1.0)
    )
    say(f"sampling with Euler's steps in place of {kind}, on the same noise process")
