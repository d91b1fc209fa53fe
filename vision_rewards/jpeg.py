"""JPEG size as a reward: DDPO's two hand-checkable objectives (Black et al., 2305.13301, sec. 5.1).

Nothing is learned here, so these two are what a training loop is tried on first.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from mmalign.types import Media, Score
from vision_rewards.cards import info_of

QUALITY = 95  # of the paper's code; chroma is subsampled 4:2:0, Pillow's and the paper's default
BYTES_PER_KILOBYTE = 1000  # as in the paper's code


def jpeg_kilobytes(picture: Image.Image, quality: int = QUALITY) -> float:
    """Size of ``picture`` as a JPEG file, in kilobytes of 1000 bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality)
    return buffer.tell() / BYTES_PER_KILOBYTE


class JpegIncompressibility:
    """The size of the picture as a JPEG of quality 95, in kilobytes."""

    info = info_of("jpeg_incompressibility")
    _sign = 1.0

    @property
    def identity(self) -> str:
        """Name, quality and encoder: libjpeg versions differ by a few bytes."""
        from PIL import __version__

        return f"{self.info.name}@q{QUALITY}-pillow-{__version__}"

    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        """Score images ``(B, 3, H, W)``; non-finite pictures are ``valid=False``.

        Raises:
            ValueError: ``media`` is a video or has another number of channels than three.
        """
        data = media.data.detach()
        if media.kind != "image" or data.shape[1] != 3:
            raise ValueError(
                f"{self.info.name} scores images (B, 3, H, W), got a {media.kind} "
                f"of shape {tuple(data.shape)}"
            )
        finite = torch.isfinite(data).flatten(1).all(1)
        pictures = Media(torch.nan_to_num(data)).to_pil()
        sizes = torch.tensor([jpeg_kilobytes(p) for p in pictures], device=data.device)
        value = torch.where(finite, self._sign * sizes.float(), torch.nan)
        broken = "the picture holds NaN or infinite values"
        notes = ["" if ok else broken for ok in finite.tolist()]
        return Score.of(value, self.identity, notes)


class JpegCompressibility(JpegIncompressibility):
    """Minus the size of the picture as a JPEG of quality 95, in kilobytes."""

    info = info_of("jpeg_compressibility")
    _sign = -1.0
