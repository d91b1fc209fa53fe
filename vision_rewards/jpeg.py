"""JPEG size as a reward: DDPO's two hand-checkable objectives (Black et al., 2305.13301, sec. 5.1).

Nothing is learned here, so these two are what a training loop is tried on first.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mmalign.types import Media
from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of

QUALITY = 95  # of the paper's code
SUBSAMPLING = "4:2:0"  # of chroma: the paper's (and Pillow's) default, stated so that it stays
BYTES_PER_KILOBYTE = 1000  # as in the paper's code


def jpeg_kilobytes(picture: Image.Image, quality: int = QUALITY) -> float:
    """Size of ``picture`` as a JPEG file, in kilobytes of 1000 bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality, subsampling=SUBSAMPLING, optimize=False)
    return buffer.tell() / BYTES_PER_KILOBYTE


class JpegIncompressibility(PixelReward):
    """The size of the picture as a JPEG of quality 95, in kilobytes."""

    info = info_of("jpeg_incompressibility")
    _sign = 1.0

    @property
    def identity(self) -> str:
        """Name, quality and encoder: libjpeg versions differ by a few bytes."""
        from PIL import __version__

        return f"{self.info.name}@q{QUALITY}-pillow-{__version__}"

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Sizes ``(B,)`` of pixels ``(B, 3, H, W)``, rounded to 8 bits first."""
        sizes = [jpeg_kilobytes(picture) for picture in Media(pixels).to_pil()]
        return Reading(self._sign * torch.tensor(sizes))


class JpegCompressibility(JpegIncompressibility):
    """Minus the size of the picture as a JPEG of quality 95, in kilobytes."""

    info = info_of("jpeg_compressibility")
    _sign = -1.0
