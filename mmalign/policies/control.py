"""Policy for ``diffusers.StableDiffusion3ControlNetPipeline``: a ControlNet learns, SD3 stays.

The trained network is the ControlNet; the transformer is part of what it is called through. Without
a picture to follow, the ControlNet is not called and the policy is the generator it was put on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmalign.policies.sd3 import SD3Policy
from mmalign.runtime.quiet import quiet
from mmalign.types import Conditioning, Media

CONTROL = "control"  # the name of a picture's latents among the tensors of a conditioning


class SD3ControlPolicy(SD3Policy):
    """Flow-matching policy over the components of a stock SD3 ControlNet pipeline.

    Raises:
        ValueError: several ControlNets, or one without an input of its own (SD 3.5 large's).
    """

    family = "sd3_control"
    component: ClassVar[str] = "controlnet"
    zero_start: ClassVar[bool] = True  # gradients pass its zero layers after the first update only

    def __init__(self, pipeline: Any, **options: Any) -> None:
        kind = type(pipeline.controlnet).__name__
        if kind != "SD3ControlNetModel" or not pipeline.controlnet.config.use_pos_embed:
            raise ValueError(
                f"the {self.family} policy trains one SD3ControlNetModel that embeds its own "
                f"input, got {kind}; use such a one (use_pos_embed: true)"
            )
        super().__init__(pipeline, **options)

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Layers whose output the architecture discards: the last block's text stream."""
        last = f"transformer_blocks.{len(self.pipeline.controlnet.transformer_blocks) - 1}"
        attention = ("add_q_proj", "norm_added_q", "to_add_out")
        return (*(f"{last}.attn.{name}" for name in attention), f"{last}.ff_context")

    @torch.no_grad()
    def controlled(self, conditioning: Conditioning, pictures: Media) -> Conditioning:
        """Conditioning that also follows ``pictures``, one a row, in both branches.

        Their latents are scaled as the stock pipeline scales them for this ControlNet.
        """
        latents = self.encode_image(pictures)
        if self._bare:
            config = self.pipeline.vae.config
            latents = latents + (config.shift_factor or 0.0) * config.scaling_factor
        negative = conditioning.negative
        return Conditioning(
            {**conditioning.positive, CONTROL: latents},
            None if negative is None else {**negative, CONTROL: latents},
        )

    def call(self, x: Tensor, time: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Velocity ``eps - x0``, ``(B, C, h, w)``."""
        text, pooled, followed = conditioning["embeds"], conditioning["pooled"], None
        if CONTROL in conditioning:
            followed = self.denoiser(
                hidden_states=x,
                controlnet_cond=conditioning[CONTROL].to(x),
                timestep=time,
                encoder_hidden_states=text,
                pooled_projections=torch.zeros_like(pooled) if self._bare else pooled,
                return_dict=False,
            )[0]
        return self.pipeline.transformer(  # type: ignore[no-any-return]
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            block_controlnet_hidden_states=followed,
            return_dict=False,
        )[0]

    @property
    def _bare(self) -> bool:
        """Whether the ControlNet is told neither the pooled prompt nor the latents' shift."""
        return bool(self.denoiser.config.force_zeros_for_pooled_projection)  # type: ignore[union-attr]


def with_controlnet(pipeline: Any, layers: int, seed: int = 0) -> Any:
    """A stock SD3 pipeline with a fresh ControlNet that copies its first ``layers`` blocks.

    Its output layers are zero, so that pictures are at first those of the pipeline.

    Raises:
        ValueError: the transformer's last block, which has no text stream to go on, would be
            copied.
    """
    from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline

    network = pipeline.transformer
    sizes = (
        "sample_size", "patch_size", "in_channels", "out_channels", "attention_head_dim",
        "num_attention_heads", "joint_attention_dim", "caption_projection_dim",
        "pooled_projection_dim", "pos_embed_max_size", "qk_norm",
    )  # fmt: skip
    if not 0 < layers < network.config.num_layers:
        raise ValueError(
            f"layers is {layers}; a ControlNet on {network.config.num_layers} blocks takes 1 to "
            f"{network.config.num_layers - 1} of them"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        control = SD3ControlNetModel(
            **{name: network.config[name] for name in sizes},
            num_layers=layers,
            dual_attention_layers=tuple(
                n for n in network.config.dual_attention_layers if n < layers
            ),
            force_zeros_for_pooled_projection=False,
        )
    for part in ("pos_embed", "time_text_embed", "context_embedder"):
        getattr(control, part).load_state_dict(getattr(network, part).state_dict())
    control.transformer_blocks.load_state_dict(network.transformer_blocks[:layers].state_dict())
    with quiet():
        control.to(network.device, network.dtype).eval()
    found = StableDiffusion3ControlNetPipeline(**pipeline.components, controlnet=control)
    # Where the recommended sampler is found.
    found.register_to_config(_name_or_path=str(getattr(pipeline, "name_or_path", "") or ""))
    return found


def shapes_control() -> Any:
    """The shapes generator with a fresh ControlNet on half of its blocks."""
    from mmalign.policies.load import load_pipeline

    return with_controlnet(load_pipeline("shapes-flow"), layers=3)


def tiny_control() -> Any:
    """The tiny random SD3 pipeline with a ControlNet, for tests."""
    from mmalign.policies.build import tiny_pipeline

    return with_controlnet(tiny_pipeline(), layers=1)
