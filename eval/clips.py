"""Videos of an evaluation: kept without loss as animated PNG files, which every browser plays.

A clip stands where a picture stands in the harness: it has a size and can be saved. What reads
only pictures sees its first frame.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL.Image import Image

from eval.reward_benchmarks.video import VIDEOS, read_frames
from mmalign.pictures import PictureError
from mmalign.runtime.extras import optional
from mmalign.types import Media, MediaKind

FRAMES_PER_SECOND = 8  # at which kept and exported clips are played; nothing is resampled
ALL = 100_000  # frames of a video that is read whole


@dataclass(frozen=True)
class Clip:
    """The frames of one video, 8-bit RGB, all of one size."""

    frames: tuple[Image, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """Width, height and number of frames: clips that differ in it cannot share a batch."""
        return (*self.frames[0].size, len(self.frames))

    def save(self, file: IO[bytes], format: str = "PNG") -> None:
        """Written as an animation without loss."""
        first, *rest = self.frames
        # Equal frames would be merged into one that is shown longer, were they not told apart;
        # of opaque frames both ways to blend are the same.
        first.save(file, format=format, save_all=True, append_images=rest,
                   duration=1000 // FRAMES_PER_SECOND,
                   blend=[k % 2 for k in range(len(self.frames))])  # fmt: skip


def pictures_of(media: Media) -> list[Image | Clip]:
    """A picture or a clip for each sample, rounded to 8 bits."""
    if media.kind == "image":
        return list(media.to_pil())
    return [Clip(tuple(Media(video).to_pil())) for video in media.data]


def media_of(pictures: Sequence[Image | Clip]) -> Media:
    """Pictures, or clips, of one common size as a batch."""
    clips = [p for p in pictures if isinstance(p, Clip)]
    if not clips:
        return Media.from_pil([p for p in pictures if not isinstance(p, Clip)])
    return Media(torch.stack([Media.from_pil(clip.frames).data for clip in clips]))


def read_clip(path: Path) -> Clip:
    """The frames of a video file, an animation or a folder, all of them.

    Raises:
        PictureError: it cannot be read, or its frames differ in size; names the file.
        MissingExtraError: a video file without PyAV.
    """
    frames = read_frames(path, ALL)
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise PictureError(f"{path}: its frames have different sizes ({sizes[0]}, {sizes[1]})")
    return Clip(tuple(frames))


def encoded_clip(path: Path, suffix: str) -> bytes:
    """A kept clip as a video file (H.264 where the encoder is there, else MPEG-4).

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    if path.suffix.lower() == suffix:
        return path.read_bytes()
    av = optional("av", "video", f"a video file ({suffix})")
    frames, buffer = read_clip(path).frames, io.BytesIO()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(buffer, "w", format=suffix.removeprefix(".")) as container:
        stream = container.add_stream(codec, rate=FRAMES_PER_SECOND)
        stream.width, stream.height = (side + side % 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 8_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_even(frame))))
        container.mux(stream.encode())
    return buffer.getvalue()


def wanted_kind(benchmark: Any) -> MediaKind:
    """What a benchmark judges: ``image`` unless it says otherwise."""
    kind: MediaKind = getattr(benchmark, "media", "image")
    return kind


def check_kind(policy: Any, benchmark: Any) -> None:
    """Refuse, before any work, a generator of what the benchmark does not judge.

    Raises:
        ValueError: names both.
    """
    wanted, made = wanted_kind(benchmark), getattr(policy, "media", "image")
    if wanted != made:
        raise ValueError(
            f"{benchmark.name} judges {wanted}s, but {policy.name} makes {made}s; use a policy of "
            f"{wanted}s, or a benchmark of {made}s"
        )


def _even(frame: Image) -> np.ndarray:
    """Pixels with sides that 4:2:0 can hold: the last row or column is repeated."""
    array = np.asarray(frame.convert("RGB"))
    return np.pad(array, ((0, array.shape[0] % 2), (0, array.shape[1] % 2), (0, 0)), mode="edge")


__all__ = ["VIDEOS", "Clip", "check_kind", "encoded_clip", "media_of", "pictures_of", "read_clip"]
