"""JPEG rewards: size in kilobytes, with DDPO's sign and quality."""

from __future__ import annotations

import io

import pytest
import torch

from mmalign.types import Media
from vision_rewards.jpeg import JpegCompressibility, JpegIncompressibility


def test_the_size_is_that_of_the_file_and_the_signs_are_opposite() -> None:
    media = Media(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    up = JpegIncompressibility().score(media, ["", ""])
    down = JpegCompressibility().score(media, ["", ""])
    assert up.value.equal(-down.value)
    buffer = io.BytesIO()
    media.to_pil()[0].save(buffer, format="JPEG", quality=95, subsampling="4:2:0")
    assert up.value[0].item() == pytest.approx(len(buffer.getvalue()) / 1000)


def test_detail_costs_kilobytes() -> None:
    flat, noisy = torch.full((1, 3, 64, 64), 0.5), torch.rand(1, 3, 64, 64)
    score = JpegCompressibility().score(Media(torch.cat([flat, noisy])), ["", ""])
    assert score.value[0] > score.value[1]


def test_a_broken_picture_is_unscored() -> None:
    data = torch.rand(2, 3, 16, 16)
    data[1, 0, 0, 0] = torch.nan
    score = JpegIncompressibility().score(Media(data), ["", ""])
    assert score.valid.tolist() == [True, False] and "NaN" in score.notes[1]


def test_a_video_is_refused_by_kind() -> None:
    with pytest.raises(ValueError, match="video"):
        JpegCompressibility().score(Media(torch.rand(1, 2, 3, 16, 16)), [""])
