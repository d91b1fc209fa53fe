"""Rewards that are a cosine between picture and prompt: CLIPScore, PickScore, HPSv2 and v2.1.

Embeddings are normalised and multiplied in fp32 whatever the precision of the towers: in bf16 a
PickScore resolves 0.1, which is more than many groups of samples differ by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of
from vision_rewards.embedding import (
    DTYPES,
    Embedder,
    assemble,
    cached,
    checked_dtype,
    load_embedder,
    state_of,
)
from vision_rewards.preprocess import Preprocess
from vision_rewards.towers import Towers
from vision_rewards.towers_open_clip import build
from vision_rewards.weights import read_weights, weights_file

Architecture = str | Mapping[str, Any]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of unit vectors ``(B, dim)``, row by row: ``(B,)`` in [-1, 1]."""
    return (a * b).sum(-1).clamp(-1.0, 1.0)


class EmbeddingReward(PixelReward):
    """Base of rewards over an :class:`~vision_rewards.embedding.Embedder`."""

    def __init__(self, embedder: Embedder, device: str | None = None) -> None:
        super().__init__(device)
        self.embedder = embedder

    @property
    def identity(self) -> str:
        """Name, weights, preprocessing and settings."""
        fingerprint = self.embedder.preprocess.fingerprint
        return f"{self.info.name}@{self.embedder.digest}-{fingerprint}{self.settings}"

    @property
    def settings(self) -> str:
        """What else changes scores, to be appended to the identity."""
        return ""

    def networks(self) -> Sequence[nn.Module]:
        """The towers."""
        return self.embedder.networks

    def alignment(self, pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
        """Cosine of each picture with its own prompt ``(B,)``, and a note where one was cut."""
        value = cosine(self.embedder.image(pixels), self.embedder.text(prompts))
        cut = "the prompt is longer than the context of the text encoder; its end was not read"
        return value, [cut if long else "" for long in self.embedder.overflow(prompts)]


class ClipScore(EmbeddingReward):
    """``multiplier * cos(image, prefix + prompt)`` of any CLIP or SigLIP.

    The paper's CLIPScore (Hessel et al. 2021, 2104.08718, eq. 1) is ``multiplier=2.5``,
    ``clamp=True``, ``prefix="A photo depicts "`` with ``openai/clip-vit-base-patch32``; the default
    is the plain cosine that reinforcement learning uses.

    Args:
        checkpoint: what :func:`~vision_rewards.embedding.load_embedder` takes.
        prefix: put before every prompt.
        clamp: replace negative cosines by 0 (which have no gradient then).
        multiplier: factor of the cosine; must be positive.
        dtype: precision of the towers.
        device: where they live; ``None`` follows the media.

    Raises:
        ValueError: a multiplier that is not positive; see also ``load_embedder``.
        OSError: the checkpoint is not there.
    """

    info = info_of("clip_score")

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        prefix: str = "",
        clamp: bool = False,
        multiplier: float = 1.0,
        dtype: str = "fp32",
        device: str | None = None,
    ) -> None:
        if not multiplier > 0:
            raise ValueError(f"multiplier must be positive (higher is better), got {multiplier}")
        super().__init__(load_embedder(checkpoint or self.info.checkpoint, dtype=dtype), device)
        self.prefix, self.clamp, self.multiplier = prefix, clamp, float(multiplier)
        low = 0.0 if clamp else -self.multiplier
        if (low, self.multiplier) != self.info.range:
            self.info = replace(self.info, range=(low, self.multiplier), typical=None)

    @property
    def settings(self) -> str:
        """Prefix, clamp and multiplier, where they are not the defaults."""
        said = f"-{self.prefix!r}" if self.prefix else ""
        said += "-clamped" if self.clamp else ""
        return said + (f"-x{self.multiplier:g}" if self.multiplier != 1 else "")

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """The scaled cosines."""
        value, notes = self.alignment(pixels, [self.prefix + p for p in prompts])
        return Reading(self.multiplier * (value.clamp_min(0) if self.clamp else value), {}, notes)


class PickScore(EmbeddingReward):
    """``exp(logit_scale) * cos(image, prompt)`` of a CLIP-H tuned on Pick-a-Pic (2305.01569).

    The scale is the checkpoint's own, so that a softmax over the scores of several pictures of one
    prompt is the published probability of preference. Published training code divides by 26.

    Args:
        checkpoint: hub name or folder of the tuned CLIP.
        processor: where tokenizer and preprocessing come from; the default checkpoint has none of
            its own and uses those of its base model, a local folder with a
            ``preprocessor_config.json`` its own.
        dtype: precision of the towers.
        device: where they live; ``None`` follows the media.

    Raises:
        ValueError: weights that do not fit, or a model without a logit scale.
        OSError: the checkpoint is not there.
    """

    info = info_of("pickscore")
    BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        processor: str | Path | None = None,
        dtype: str = "fp32",
        device: str | None = None,
    ) -> None:
        source = checkpoint or self.info.checkpoint
        own = (Path(source).expanduser() / "preprocessor_config.json").is_file()
        processor = processor or (None if own else self.BASE)
        super().__init__(load_embedder(source, dtype=dtype, processor=processor), device)
        if self.embedder.logit_scale is None:
            raise ValueError(f"{source} has no logit scale; PickScore needs a CLIP")

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Scaled cosines; the plain ones are the part ``cosine``."""
        value, notes = self.alignment(pixels, prompts)
        scale = self.embedder.logit_scale
        assert scale is not None
        return Reading(scale.to(value.device).exp() * value, {"cosine": value.detach()}, notes)


class Hpsv2(EmbeddingReward):
    """Cosine of a CLIP-H tuned on the Human Preference Dataset v2 (2306.09341), no logit scale.

    Pictures are resized by their longest side and padded with black, as the published evaluation
    does; published tables print 100 times the value. Scores of v2 and v2.1 are on different scales,
    and only pictures of the same prompt should be compared.

    Args:
        checkpoint: the published file (``{"state_dict": ...}``), or ``org/repo:file``.
        architecture: an open_clip name, or ``{"embed_dim":, "vision_cfg":, "text_cfg":}``.
        antialias: filter when shrinking. Tables made with old torchvision tensors lack it.
        dtype: precision of the towers.
        device: where they live; ``None`` follows the media.

    Raises:
        ValueError: weights that do not fit the architecture, naming the keys.
        OSError: the file is not there.
    """

    info = info_of("hpsv2")

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        architecture: Architecture = "ViT-H-14",
        antialias: bool = True,
        dtype: str = "fp32",
        device: str | None = None,
    ) -> None:
        file = weights_file(checkpoint or self.info.checkpoint)
        kind = DTYPES[checked_dtype(dtype)]
        key = ("hps", state_of(file), repr(architecture), antialias, dtype)
        super().__init__(cached(key, lambda: _hps(file, architecture, antialias, kind)), device)

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """The cosines."""
        value, notes = self.alignment(pixels, prompts)
        return Reading(value, {}, notes)


class Hpsv21(Hpsv2):
    """As :class:`Hpsv2`, with the weights of version 2.1; the two scales differ."""

    info = info_of("hpsv2_1")


def _hps(file: Path, architecture: Architecture, antialias: bool, dtype: torch.dtype) -> Embedder:
    towers = build(architecture, read_weights(file), file)
    assert isinstance(towers.preprocess, Preprocess)
    preprocess = replace(towers.preprocess, fit="longest", antialias=antialias, resize=None)
    own = Towers(towers.image, towers.text, preprocess, towers.dim, towers.logit_scale)
    return assemble(own, dtype)
