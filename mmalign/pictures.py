"""Pictures as users hold them (files, folders, Pillow images, tensors), as batches of media."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmalign.types import Media

Pictures = Any  # Media, a tensor, a path or Pillow image, or a sequence of the last two


def open_pictures(source: Pictures) -> Media | list[Any]:
    """What :func:`batches` takes: media as they are, anything else as a list of files and images.

    A folder stands for its pictures in natural order. Files are not read here.

    Raises:
        ValueError: nothing there, or an item that is no picture.
        FileNotFoundError: a file that does not exist.
    """
    if isinstance(source, torch.Tensor):
        source = Media(source)
    if isinstance(source, (str, os.PathLike, Image.Image)):
        source = [source]
    if not isinstance(source, Media):
        source = [picture for item in source for picture in _expanded(item)]
    if not len(source):
        raise ValueError("there are no pictures: the list is empty")
    return source


def _expanded(item: Any) -> Sequence[Any]:
    if isinstance(item, Image.Image):
        return [item]
    if not isinstance(item, (str, os.PathLike)):
        raise ValueError(
            f"a picture must be a path or a Pillow image, got a {type(item).__name__}; give "
            "tensors as one batch (B, C, H, W)"
        )
    path = Path(item)
    if path.is_dir():
        from mmalign.commands.common import image_files

        return image_files([str(path)])
    if not path.is_file():
        raise FileNotFoundError(f"no picture or folder {path}")
    return [path]


def batches(pictures: Media | list[Any], batch_size: int) -> Iterator[tuple[list[int], Media]]:
    """Batches of at most ``batch_size`` pictures of one size, with their places in ``pictures``.

    Files are read when their batch comes, so a folder of any length fits in memory.

    Raises:
        ValueError: ``batch_size`` below 1. OSError: a file that is not a picture; names it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if isinstance(pictures, Media):
        groups = [list(range(len(pictures)))]
    else:
        sizes: dict[tuple[int, int], list[int]] = {}
        for i, picture in enumerate(pictures):
            sizes.setdefault(_size(picture), []).append(i)
        groups = list(sizes.values())
    for group in groups:
        for at in range(0, len(group), batch_size):
            rows = group[at : at + batch_size]
            if isinstance(pictures, Media):
                yield rows, pictures[rows]
            else:
                yield rows, Media.from_pil([_read(pictures[i]) for i in rows])


def _size(picture: Any) -> tuple[int, int]:
    if isinstance(picture, Image.Image):
        return picture.size
    with Image.open(picture) as image:  # reads the header only
        return image.size


def _read(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    with Image.open(picture) as image:
        return image.convert("RGB")
