"""Towers of published embedding models, cut into an image and a text half.

Loading differs between libraries; what comes out does not: an image tower from network input to
features, and a text tower from prompts to features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vision_rewards.preprocess import Fit, Preprocess


class PixelTransform(Protocol):
    """Pixels to network input, with a name of everything that changes the result."""

    @property
    def fingerprint(self) -> str:
        """A short readable name of every setting."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels ``(B, 3, H, W)`` in [0, 1] to network input."""
        ...


class TextTower(nn.Module):
    """A text encoder with its tokenizer: prompts to features ``(B, dim)``."""

    def forward(self, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def overflow(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts have more tokens than the context holds."""
        raise NotImplementedError


@dataclass(frozen=True)
class Towers:
    """What a loader returns; ``logit_scale`` is a logarithm."""

    image: nn.Module
    text: TextTower | None
    preprocess: PixelTransform
    dim: int
    logit_scale: Tensor | None = None


def load_towers(
    checkpoint: str | Path, vision_only: bool = False, processor: str | Path | None = None
) -> Towers:
    """Load the towers of ``checkpoint`` (see :func:`vision_rewards.embedding.load_embedder`).

    Raises:
        OSError: not there and cannot be fetched.
        ValueError: an unknown kind of model, or weights that do not fit it.
    """
    from vision_rewards import towers_open_clip, towers_transformers

    name = towers_open_clip.model_name(checkpoint)
    if name is not None:
        return towers_open_clip.load(name, vision_only)
    return towers_transformers.load(str(checkpoint), vision_only, processor)


def tensor_preprocess(
    *,
    size: int,
    fit: Fit,
    mean: Sequence[float],
    std: Sequence[float],
    mode: str,
    resize: int | None = None,
) -> Preprocess:
    """A :class:`Preprocess` from values as they stand in a configuration file.

    Raises:
        ValueError: an interpolation other than bicubic and bilinear, or not three channels.
    """
    if mode not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation {mode!r} is not supported; bicubic and bilinear are")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"preprocessing needs 3 channels, got mean {mean} and std {std}")
    m, s = (tuple(float(v) for v in values) for values in (mean, std))
    return Preprocess(size=size, fit=fit, mean=m, std=s, mode=mode, resize=resize)  # type: ignore[arg-type]


def square_side(size: Any, what: str) -> int:
    """The side of a square given as a number, a pair or ``{"height": , "width": }``.

    Raises:
        ValueError: it is not a square.
    """
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or pair[0] != pair[1] or not isinstance(pair[0], int):
        raise ValueError(f"{what} must be a square of a whole number of pixels, got {size}")
    return pair[0]


def device_of(module: nn.Module) -> torch.device:
    """Where the parameters of ``module`` live."""
    return next(module.parameters()).device
