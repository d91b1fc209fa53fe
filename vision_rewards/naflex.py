"""SigLIP 2 NaFlex (Tschannen et al. 2025, 2502.14786, sec. 2.4.2): pictures keep their aspect.

A picture is resized to at most so many patches with as little change of its aspect as multiples of
the patch allow. All pictures of a batch have one size, so that none needs padding or a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRECISION = 1e-5  # of the bisection for the scale, as published


@dataclass(frozen=True, kw_only=True)
class NaflexPreprocess:
    """Resize to multiples of ``patch`` with at most ``patches`` of them, then normalise.

    Attributes:
        patch: side of a patch in pixels.
        patches: largest number of patches.
        mean, std: per channel, applied to pixels in [0, 1].
    """

    patch: int
    patches: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels ``(B, 3, H, W)`` in [0, 1] to ``(B, 3, rows * patch, columns * patch)``, fp32."""
        size = self.target(*pixels.shape[-2:])
        resized = F.interpolate(
            pixels.float(), size, mode="bilinear", align_corners=False, antialias=True
        )
        mean, std = (resized.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (resized - mean) / std

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The size a picture of ``height`` and ``width`` pixels is resized to."""
        low, high = PRECISION / 10, 100.0
        while high - low >= PRECISION:
            middle = (low + high) / 2
            rows, columns = (self._count(middle * side) for side in (height, width))
            low, high = (middle, high) if rows * columns <= self.patches else (low, middle)
        return self._count(low * height) * self.patch, self._count(low * width) * self.patch

    @property
    def fingerprint(self) -> str:
        """A short readable name of every setting that changes scores."""
        return f"naflex{self.patches}x{self.patch}-{self.mean[0]:g}-{self.std[0]:g}"

    def _count(self, side: float) -> int:
        return max(1, ceil(side / self.patch))


class NaflexImage(nn.Module):
    """The image half of SigLIP 2 NaFlex: cuts its input into patches, gives the pooled token."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.patch = int(vision_model.config.patch_size)  # type: ignore[union-attr, arg-type]

    def forward(self, pixels: Tensor) -> Tensor:
        """Network input ``(B, 3, rows * patch, columns * patch)`` to features ``(B, dim)``."""
        count, p = len(pixels), self.patch
        rows, columns = (side // p for side in pixels.shape[-2:])
        cut = pixels.reshape(count, 3, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
        shape = torch.tensor([[rows, columns]], device=pixels.device).expand(count, 2)
        pooled: Tensor = self.vision_model(
            pixel_values=cut.reshape(count, rows * columns, -1),
            pixel_attention_mask=shape.new_ones(count, rows * columns),
            spatial_shapes=shape,
        ).pooler_output
        return pooled


def load_naflex(source: str) -> NaflexPreprocess:
    """The preprocessing of a SigLIP 2 NaFlex checkpoint.

    Raises:
        OSError: there is no preprocessor configuration.
    """
    from transformers import AutoImageProcessor

    values = AutoImageProcessor.from_pretrained(source).to_dict()
    return NaflexPreprocess(
        patch=values["patch_size"],
        patches=values["max_num_patches"],
        mean=tuple(values["image_mean"]),
        std=tuple(values["image_std"]),
    )
