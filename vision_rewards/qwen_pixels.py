"""Qwen2-VL's picture input as differentiable tensor operations (Wang et al., 2409.12191, sec. 2).

The picture is resized to a multiple of 28 pixels with its area inside given bounds, normalised, and
cut into patches of 14 pixels.  Patches of one 2x2 square, which the network merges into one token,
stand side by side; every patch holds the picture twice, because the network reads frames in pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from vision_rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess

MAX_ASPECT = 200.0  # beyond it Qwen refuses a picture


@dataclass(frozen=True, kw_only=True)
class QwenPatches:
    """Pixels to patches.

    Attributes:
        min_pixels, max_pixels: bounds of the area after resizing, in pixels.
        patch: side of a patch in pixels.
        merge: patches along the side of a square that becomes one token.
        frames: how often a still picture is repeated in time.
    """

    min_pixels: int
    max_pixels: int
    patch: int = 14
    merge: int = 2
    frames: int = 2

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, in pixels.

        Raises:
            ValueError: a side is more than 200 times the other.
        """
        long, short = max(height, width), min(height, width)
        if long > MAX_ASPECT * short:
            raise ValueError(
                f"a picture of {height}x{width} pixels is longer than {MAX_ASPECT:g}:1"
            )
        unit = self.patch * self.merge
        rows, columns = round(height / unit), round(width / unit)
        area = rows * columns * unit * unit
        if area > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(s / shrink / unit)) for s in (height, width))
        elif area < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(s * grow / unit) for s in (height, width))
        return rows * unit, columns * unit

    def __call__(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pixels ``(B, 3, H, W)`` in [0, 1] to patches.

        Returns:
            patches ``(B, rows * columns, 3 * frames * patch * patch)`` and ``(rows, columns)``,
            counted in patches.
        """
        height, width = self.target(*pixels.shape[-2:])
        if pixels.shape[-2:] != (height, width):
            pixels = F.interpolate(
                pixels, (height, width), mode="bicubic", align_corners=False, antialias=True
            ).clamp(0, 1)  # bicubic overshoots at edges; an 8-bit picture cannot
        normal = Preprocess(size=height, mean=CLIP_MEAN, std=CLIP_STD).normalise(pixels)
        rows, columns = height // self.patch, width // self.patch
        return self._cut(normal, rows, columns), (rows, columns)

    @property
    def fingerprint(self) -> str:
        """A short readable name of every setting that changes scores."""
        return f"{self.min_pixels}-{self.max_pixels}px-{self.patch}x{self.merge}x{self.frames}"

    def _cut(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        batch, channels = pixels.shape[:2]
        m, p = self.merge, self.patch
        grid = pixels.reshape(batch, channels, rows // m, m, p, columns // m, m, p)
        # (B, square row, square column, row in square, column in square, C, patch y, patch x)
        squares = grid.permute(0, 2, 5, 3, 6, 1, 4, 7)
        twice = squares.unsqueeze(6).expand(*squares.shape[:6], self.frames, p, p)
        return twice.reshape(batch, rows * columns, channels * self.frames * p * p)
