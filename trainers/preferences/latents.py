"""Latents of pictures on disk: encoded once, kept by what they depend on.

The key of a latent is the content of the picture, the weights and the scale of the autoencoder, and
the size that the picture is brought to. Files are those of
:class:`vision_rewards.training.features.FeatureCache`: whole or absent, a damaged one is named and
made anew, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.protocols import Policy
from mmalign.types import Media
from vision_rewards.training.features import FeatureCache, fill, read_pictures

SHARD = 512  # latents of one file


def fitted(picture: Tensor, height: int, width: int) -> Tensor:
    """A picture ``(3, H, W)`` brought to a size: the shorter side resized, the centre kept."""
    rows, columns = picture.shape[-2:]
    if (rows, columns) == (height, width):
        return picture
    scale = max(height / rows, width / columns)
    size = max(height, round(rows * scale)), max(width, round(columns * scale))
    resized = F.interpolate(
        picture[None], size=size, mode="bicubic", antialias=True, align_corners=False
    )[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[:, top : top + height, left : left + width]


class Latents:
    """Latents of the pictures of a data set under one autoencoder.

    Args:
        policy: encodes what is missing (``encode_image``), at the size of its ``sampler``.
        folder: of the cache; several runs may share it.
        digests: SHA-256 of the content of each picture, by file.

    Attributes:
        computed: pictures that were not in the cache before.

    Raises:
        ValueError: the policy cannot encode pictures.
    """

    def __init__(
        self, policy: Policy, folder: Path, digests: Mapping[Path, str], batch_size: int = 32
    ) -> None:
        encode: Any = getattr(policy, "encode_image", None)
        if encode is None:
            raise ValueError(
                f"{policy.name} cannot encode pictures (it has no encode_image), so it cannot "
                "learn from files; make pairs online: leave out pairs.data"
            )
        height, width = policy.sampler.height, policy.sampler.width
        codec = f"{getattr(policy, 'codec_identity', policy.name)}-{height}x{width}"
        self.digests, self.device = digests, policy.device
        self.cache = FeatureCache(folder / hashlib.sha256(codec.encode()).hexdigest()[:16])

        def latents(files: list[Path]) -> Tensor:
            pictures = [fitted(p, height, width) for p in read_pictures(files)]
            found: Tensor = encode(Media(torch.stack(pictures)))
            return found

        wanted = {digest: file for file, digest in digests.items()}
        self.computed = fill(self.cache, wanted, latents, batch_size, "latents", SHARD)

    def __call__(self, files: Sequence[Path]) -> Tensor:
        """Latents ``(B, ...)`` fp32 of pictures, on the policy's device."""
        return self.cache.rows([self.digests[file] for file in files]).to(self.device)
