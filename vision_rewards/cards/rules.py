"""Rewards by rule: file size, statistics of the pixels, text recognition, object detection."""

from __future__ import annotations

from mmalign.reward_info import RewardInfo

_DDPO = "DDPO, Black et al. 2023, arXiv:2305.13301"

CARDS: tuple[tuple[str, RewardInfo], ...] = (
    (
        "vision_rewards.jpeg:JpegCompressibility",
        RewardInfo(
            name="jpeg_compressibility",
            needs=(),
            range=(None, 0.0),
            summary="minus the size as a JPEG in kilobytes: plain pictures win",
            source=_DDPO,
            licence="Apache-2.0",
        ),
    ),
    (
        "vision_rewards.jpeg:JpegIncompressibility",
        RewardInfo(
            name="jpeg_incompressibility",
            needs=(),
            range=(0.0, None),
            summary="size as a JPEG in kilobytes: detailed pictures win",
            source=_DDPO,
            licence="Apache-2.0",
        ),
    ),
)
