"""Pixels as a network wants them, as differentiable tensor operations.

Published preprocessing works on 8-bit PIL images; here the same resize, crop and normalisation act
on float tensors, so that gradients reach the pixels and a batch needs no loop in Python.  On 8-bit
input the two agree to within about one grey level of the resized picture (PIL rounds after each
pass of its resize, a tensor does not).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Fit = Literal["shortest", "longest", "squash"]
# With ``shortest``, longer pictures lose their ends first: fitted by its shorter side, a line of
# 20,000 pixels would become a picture of 4.5 million, of which the crop keeps 224.
MAX_ASPECT = 16


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize, crop or pad to a square, normalise.

    Attributes:
        size: side of the square that the network sees, in pixels.
        fit: ``shortest`` resizes the shorter side to ``size`` and crops the centre (CLIP; of
            pictures longer than 16:1 the ends are cut off before);
            ``longest`` resizes the longer side and pads with black (HPSv2); ``squash`` ignores
            the aspect (SigLIP).
        mean, std: per channel, applied to pixels in [0, 1].
        mode: ``bicubic`` or ``bilinear``.
        antialias: widen the filter when shrinking, as PIL does. Published tables made with old
            torchvision tensors lack it.
        resize: with ``shortest``, what the shorter side becomes before the crop, if not ``size``
            (DINOv2: 256 before a crop of 224).
    """

    size: int
    fit: Fit = "shortest"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    mode: str = "bicubic"
    antialias: bool = True
    resize: int | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels ``(B, 3, H, W)`` in [0, 1] to network input ``(B, 3, size, size)``, fp32."""
        return self.normalise(self.square(pixels.float()))

    def square(self, pixels: Tensor) -> Tensor:
        """Pixels resized and cropped or padded to the square, still in [0, 1]."""
        if self.fit == "squash":
            return self._resize(pixels, self.size, self.size)
        if self.fit == "shortest":
            pixels = _without_ends(pixels)
        height, width = pixels.shape[-2:]
        pick = min if self.fit == "shortest" else max
        side_to = (self.resize or self.size) if self.fit == "shortest" else self.size
        scale = side_to / pick(height, width)
        # torchvision truncates the other side when it fits the shortest, and rounds for padding.
        whole = int if self.fit == "shortest" else round
        target = [
            side_to if side == pick(height, width) else max(1, whole(side * scale))
            for side in (height, width)
        ]
        resized = self._resize(pixels, *target)
        return self._crop(resized) if self.fit == "shortest" else self._pad(resized)

    def normalise(self, pixels: Tensor) -> Tensor:
        """``(pixels - mean) / std`` per channel."""
        mean, std = (
            torch.tensor(v, dtype=pixels.dtype, device=pixels.device).view(1, 3, 1, 1)
            for v in (self.mean, self.std)
        )
        return (pixels - mean) / std

    @property
    def fingerprint(self) -> str:
        """A short readable name of every setting that changes scores."""
        kind = f"{self.size}{self.fit}-{self.mode}{'' if self.antialias else '-noaa'}"
        before = f"{self.resize}-" if self.resize not in (None, self.size) else ""
        return f"{before}{kind}-{self.mean[0]:g}-{self.std[0]:g}"

    def _resize(self, pixels: Tensor, height: int, width: int) -> Tensor:
        if pixels.shape[-2:] == (height, width):
            return pixels
        resized = F.interpolate(
            pixels,
            (height, width),
            mode=self.mode,
            align_corners=False,
            antialias=self.antialias,
        )
        # Bicubic overshoots at edges; an 8-bit image cannot, so neither may we. The clamp passes
        # gradients inside [0, 1].
        return resized.clamp(0, 1)

    def _crop(self, pixels: Tensor) -> Tensor:
        # As torchvision's CenterCrop: half of an odd margin is rounded to even.
        top, left = (round((s - self.size) / 2.0) for s in pixels.shape[-2:])
        return pixels[..., top : top + self.size, left : left + self.size]

    def _pad(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        top, left = (self.size - height) // 2, (self.size - width) // 2
        return F.pad(pixels, (left, self.size - width - left, top, self.size - height - top))


def _without_ends(pixels: Tensor) -> Tensor:
    """The middle of pictures longer than :data:`MAX_ASPECT`; others as they are.

    As many pixels go at one end as at the other, so that the centre stays where it was.
    """
    height, width = pixels.shape[-2:]
    most = MAX_ASPECT * min(height, width)
    top, left = (max(0, (side - most) // 2) for side in (height, width))
    return pixels[..., top : height - top, left : width - left]
