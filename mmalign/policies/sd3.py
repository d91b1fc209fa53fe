"""Policy for the Stable Diffusion 3 / 3.5 class: ``diffusers.StableDiffusion3Pipeline``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.protocols import Parameterisation, Sampler
from mmalign.types import Conditioning, Media, MediaKind

SAMPLER_FILE = "sampler.json"  # beside model_index.json: the sampler the model's makers recommend


class SD3Policy:
    """Flow-matching policy over the components of a stock SD3-class pipeline.

    Args:
        pipeline: the user's own pipeline object; it is used in place, never copied.
        name: how reports call it; defaults to where the pipeline was loaded from.
        max_sequence_length: T5 tokens, also the zero tokens that the pipeline appends when it has
            no T5. ``None`` takes the recommended sampler's, else diffusers' default of 256.
    """

    family = "sd3"
    parameterisation: Parameterisation = "flow"
    media: MediaKind = "image"

    def __init__(
        self, pipeline: Any, *, name: str = "", max_sequence_length: int | None = None
    ) -> None:
        _check_scheduler(pipeline.scheduler)
        self.pipeline = pipeline
        self.name = name or str(getattr(pipeline, "name_or_path", "") or type(pipeline).__name__)
        recommended = _recommended(pipeline)
        side = pipeline.default_sample_size * pipeline.vae_scale_factor
        self.sampler = Sampler(
            steps=recommended.get("steps", 28),
            guidance_scale=recommended.get("guidance_scale", 4.5),
            height=recommended.get("height", side),
            width=recommended.get("width", side),
        )
        default = recommended.get("max_sequence_length", 256)
        self.max_sequence_length = default if max_sequence_length is None else max_sequence_length

    @property
    def device(self) -> torch.device:
        """Where the transformer lives."""
        return self.denoiser.device  # type: ignore[return-value]

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's ``SD3Transformer2DModel``."""
        return self.pipeline.transformer  # type: ignore[no-any-return]

    @denoiser.setter
    def denoiser(self, network: nn.Module) -> None:
        self.pipeline.transformer = network

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Layers whose output the architecture discards: no gradient can ever reach them.

        The last joint block drops its text stream, so its text queries are computed for nothing.
        """
        last = f"transformer_blocks.{len(self.pipeline.transformer.transformer_blocks) - 1}.attn"
        return (f"{last}.add_q_proj", f"{last}.norm_added_q")

    @property
    def identity(self) -> str:
        """Hash of the denoiser's weights, for provenance."""
        digest = hashlib.sha256()
        for key, value in sorted(self.denoiser.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().float().cpu().numpy().tobytes())
        return f"{self.name}@{digest.hexdigest()[:12]}"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts and the empty prompt, on the policy's device.

        Raises:
            ValueError: a prompt has more tokens than the CLIP text encoders take; silently
                truncating it would train on another prompt than the one scored.
        """
        self._check_length(prompts)
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

    def init_noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents ``(B, C, h, w)``, one CPU generator per seed.

        The same draw as the stock pipeline's for ``generator=[torch.Generator().manual_seed(s)]``.
        """
        scale = self.pipeline.vae_scale_factor
        channels = self.pipeline.transformer.config.in_channels
        shape = (1, channels, self.sampler.height // scale, self.sampler.width // scale)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.cat(rows).to(self.device)

    def sigmas(self, steps: int) -> Tensor:
        """The pipeline scheduler's own grid, ``(steps + 1,)``, ending at 0."""
        # A fresh scheduler: the pipeline's own carries state between calls.
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        options = {}
        if scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = self._dynamic_shift()
        scheduler.set_timesteps(steps, device=self.device, **options)
        return scheduler.sigmas.float()  # type: ignore[no-any-return]

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """Velocity ``eps - x0``, ``(B, C, h, w)`` fp32; guidance above 1 batches both branches."""
        guided = guidance_scale > 1 and conditioning.negative is not None
        cond = conditioning.positive
        x = latents.to(self.pipeline.transformer.dtype)
        time = (sigma * self.pipeline.scheduler.config.num_train_timesteps).expand(len(x))
        if guided:
            negative = conditioning.negative or {}
            cond = {k: torch.cat([negative[k], v]) for k, v in cond.items()}
            x, time = torch.cat([x, x]), torch.cat([time, time])
        velocity = self.pipeline.transformer(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=cond["embeds"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]
        if guided:
            # Combined in the network's precision, as the stock pipeline does.
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
        return velocity.float()  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Media:
        """Latents to images ``(B, 3, H, W)`` in [0, 1]."""
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pixels = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return Media((pixels.float() / 2 + 0.5).clamp(0, 1))

    def _check_length(self, prompts: Sequence[str]) -> None:
        limits = [(self.pipeline.tokenizer, self.pipeline.tokenizer_max_length)]
        if self.pipeline.tokenizer_3 is not None:
            limits.append((self.pipeline.tokenizer_3, self.max_sequence_length))
        for tokenizer, limit in limits:
            for prompt in prompts:
                count = len(tokenizer(prompt).input_ids)
                if count > limit:
                    raise ValueError(
                        f"prompt has {count} tokens but a text encoder of {self.name} takes "
                        f"{limit} (start and end included): {prompt!r}. "
                        f"Shorten it by {count - limit} tokens."
                    )

    def _dynamic_shift(self) -> float:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
            calculate_shift,
        )

        config = self.pipeline.scheduler.config
        scale, patch = self.pipeline.vae_scale_factor, self.pipeline.transformer.config.patch_size
        tokens = (self.sampler.height // scale // patch) * (self.sampler.width // scale // patch)
        return calculate_shift(  # type: ignore[no-any-return]
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )


def _check_scheduler(scheduler: Any) -> None:
    """Only the deterministic Euler flow scheduler: the suite adds its own noise."""
    kind = type(scheduler).__name__
    if kind != "FlowMatchEulerDiscreteScheduler" or scheduler.config.get("stochastic_sampling"):
        raise ValueError(
            f"the SD3 policy needs a FlowMatchEulerDiscreteScheduler without stochastic_sampling, "
            f"got {kind}; set pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config("
            "pipeline.scheduler.config)"
        )


def _recommended(pipeline: Any) -> dict[str, Any]:
    """The recommended sampler beside a pipeline loaded from a folder, else nothing."""
    path = Path(str(getattr(pipeline, "name_or_path", "") or "")) / SAMPLER_FILE
    if not path.is_file():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8")))
