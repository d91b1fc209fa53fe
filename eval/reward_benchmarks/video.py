"""Frames of videos in files: a folder of frames, an animation, or a video file through PyAV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from eval.reward_benchmarks.items import Item
from mmalign.pictures import PictureError, open_pictures, read_picture, to_rgb
from mmalign.runtime.extras import MissingExtraError, optional

T = TypeVar("T")
VIDEOS = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".m4v")
ANIMATIONS = (".gif", ".webp", ".png", ".apng")


def read_video(source: Path | bytes | Callable[[], Any] | None, frames: int = 8) -> Tensor:
    """``frames`` frames spread evenly over a video, first and last included: ``(T, 3, H, W)``.

    Args:
        source: a folder of pictures in the order of their names, an animated picture
            (``.gif``, ``.webp``, ``.png``), a video file (needs the extra ``video``, PyAV), or a
            function that gives the frames as a tensor.

    A video of fewer frames gives all it has.

    Raises:
        PictureError: it cannot be read; names the file.
        MissingExtraError: a video file without PyAV.
    """
    if callable(source):
        return torch.stack(chosen(list(source()), frames))
    if not isinstance(source, Path):
        raise PictureError(f"a video must be a file or a folder, got a {type(source).__name__}")
    images = read_frames(source, frames)
    if len({image.size for image in images}) > 1:
        raise PictureError(f"{source}: its frames have different sizes")
    return torch.stack([_tensor(image) for image in images])


def read_frames(source: Path, frames: int) -> list[Image.Image]:
    """As :func:`read_video` for a file or folder, as 8-bit RGB pictures.

    Raises:
        PictureError: it cannot be read; names the file. MissingExtraError: see there.
    """
    if not source.exists():
        raise PictureError(f"{source}: there is no such video")
    try:
        return _frames(source, frames)
    except (MissingExtraError, PictureError):
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise PictureError(f"{source}: {type(error).__name__}: {error}") from error


def check_decoders(items: Sequence[Item]) -> None:
    """Stop before any work where there are video files and nothing that reads them.

    Raises:
        MissingExtraError: says what to install.
    """
    for item in items:
        for held in (*item.candidates, item.context.get("video")):
            source = getattr(held, "source", None)
            if isinstance(source, Path) and source.suffix.lower() in VIDEOS:
                optional("av", "video", f"the video file {source.name}")
                return


def chosen(frames: Sequence[T], count: int) -> list[T]:
    """At most ``count`` frames, spread evenly. Raises :class:`PictureError` for none."""
    if not frames:
        raise PictureError("the video holds no frame")
    places = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return [frames[i] for i in places]


def _frames(path: Path, count: int) -> list[Image.Image]:
    """The chosen frames; only these are converted to pictures."""
    if path.is_dir():
        files: Any = open_pictures(path)
        return [read_picture(file) for file in chosen(files, count)]
    if path.suffix.lower() in ANIMATIONS:
        with Image.open(path) as animation:
            stills = [frame.copy() for frame in ImageSequence.Iterator(animation)]
        return [to_rgb(still) for still in chosen(stills, count)]
    av = optional("av", "video", f"the video file {path}")
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
        return [frame.to_image() for frame in chosen(decoded, count)]


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
