"""Pictures as users hold them (files, folders, Pillow images, tensors), as batches of media."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from mmalign.types import Media

Pictures = Any  # Media, a tensor, a path or Pillow image, or a sequence of the last two
MAX_PIXELS = 89_478_485  # Pillow's own bound against decompression bombs: 256 MiB of 8-bit RGB
DECODERS = 4  # threads that read files ahead of the scorer
HELD_BATCHES = 4  # batches' worth of pictures of rare sizes that wait for company
_ORIENTATION = 0x0112  # the EXIF tag


class PictureError(ValueError):
    """A file that cannot be used as a picture; the message names it and says why."""


# --- one picture ------------------------------------------------------------------------------


def read_picture(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file as upright 8-bit RGB (see :func:`to_rgb`); of an animation its first
    frame.

    Raises:
        PictureError: missing, not a picture, truncated, damaged, or of more than ``max_pixels``.
    """
    try:
        with Image.open(path) as image:
            _check_size(image, max_pixels)
            return to_rgb(image)
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"{path}: not a picture in a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path}: {error}; raise max_pixels to read it") from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        said = f"{error}" if isinstance(error, PictureError) else f"{type(error).__name__}: {error}"
        raise PictureError(f"{path}: {said}") from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError(
            f"{width} x {height} are {width * height:,} pixels, at most {max_pixels:,} are read; "
            "raise max_pixels to read it"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow picture as 8-bit RGB, upright.

    * EXIF orientation is applied.
    * Transparent pixels are laid over white, as a page shows them; Pillow's plain conversion
      would show whatever colour hides under them.
    * 16-bit grey is scaled to 8 bits (65535 becomes 255); Pillow's plain conversion clips it.
    * Floating-point pixels are read as [0, 1].
    * Grey, palette, CMYK and other modes are converted by Pillow; colour profiles are ignored.

    Raises:
        PictureError: integer or floating-point values without a known white level.
        ValueError: a mode that Pillow cannot convert.
    """
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        return _scaled(image)
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except (SyntaxError, ValueError, KeyError, IndexError, TypeError):
        return image  # a damaged tag spoils no pixel


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of 16-bit integers or of floats in [0, 1] as 8-bit RGB."""
    import numpy as np

    values = np.asarray(image, dtype=np.float64)
    white = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= white):  # also where a value is NaN
        raise PictureError(
            f"pixels of mode {image.mode} from {low:g} to {high:g}: the white level is unknown "
            f"outside [0, {white:g}]; save it as 8-bit or 16-bit"
        )
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8)).convert("RGB")


# --- many pictures ----------------------------------------------------------------------------


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


Batch = tuple[list[int], Media | PictureError]


def batches(
    pictures: Media | list[Any], batch_size: int, max_pixels: int = MAX_PIXELS
) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` pictures of one size, with their places in ``pictures``.

    Every file is decoded once, by a few threads and about one batch ahead of the consumer, so
    that a folder of any length fits in memory and reading it overlaps with scoring.  Sizes may
    come in any order: pictures of a rare size wait until a batch of them is full or too many
    wait.  A picture that cannot be read comes alone, as the error.

    Raises:
        ValueError: ``batch_size`` or ``max_pixels`` below 1.
    """
    _check_bounds(batch_size, max_pixels)
    if isinstance(pictures, Media):
        for at in range(0, len(pictures), batch_size):
            rows = list(range(at, min(at + batch_size, len(pictures))))
            yield rows, pictures[rows]
        return
    with _pixel_bound(max_pixels), closing(_decoded(pictures, batch_size, max_pixels)) as decoded:
        yield from _grouped(decoded, batch_size)


def _check_bounds(batch_size: int, max_pixels: int) -> None:
    if batch_size < 1 or max_pixels < 1:
        said = f"batch_size {batch_size} and max_pixels {max_pixels}"
        raise ValueError(f"{said} must be 1 or more")


def whole_groups(
    pictures: Media | list[Any],
    groups: Sequence[Sequence[int]],
    batch_size: int,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Batch]:
    """As :func:`batches`, but the readable pictures of a group come in one batch, all of them.

    Small groups of one size share a batch of at most ``batch_size``; a larger group is a batch of
    its own. Pictures of a group that differ in size cannot be one batch: each comes as the error.

    Raises:
        ValueError: ``batch_size`` or ``max_pixels`` below 1.
    """
    _check_bounds(batch_size, max_pixels)
    if isinstance(pictures, Media):
        for rows in _packed(groups, batch_size):
            yield rows, pictures[rows]
        return
    listed = [pictures[row] for group in groups for row in group]
    waiting: list[tuple[int, Image.Image]] = []
    with _pixel_bound(max_pixels), closing(_decoded(listed, batch_size, max_pixels)) as decoded:
        for group in groups:
            found = [(row, next(decoded)) for row in group]
            yield from (([row], one) for row, one in found if isinstance(one, PictureError))
            fresh = [(row, one) for row, one in found if not isinstance(one, PictureError)]
            sizes = {one.size for _, one in fresh}
            if len(sizes) > 1:
                yield from (([row], _mixed(sizes)) for row, _ in fresh)
                continue
            same = not waiting or waiting[0][1].size in sizes
            if fresh and waiting and (not same or len(waiting) + len(fresh) > batch_size):
                yield _batch(waiting)
                waiting = []
            waiting += fresh
    if waiting:
        yield _batch(waiting)


def _packed(groups: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    rows: list[int] = []
    for group in groups:
        if rows and len(rows) + len(group) > batch_size:
            yield rows
            rows = []
        rows = [*rows, *group]
    if rows:
        yield rows


def _mixed(sizes: set[tuple[int, int]]) -> PictureError:
    said = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
    return PictureError(
        f"the pictures of its group have different sizes ({said}); those that are compared with "
        "each other must be of one size: resize them"
    )


def _grouped(decoded: Iterator[Image.Image | PictureError], batch_size: int) -> Iterator[Batch]:
    waiting: dict[tuple[int, int], list[tuple[int, Image.Image]]] = {}
    held = 0
    for row, picture in enumerate(decoded):
        if isinstance(picture, PictureError):
            yield [row], picture
            continue
        group = waiting.setdefault(picture.size, [])
        group.append((row, picture))
        held += 1
        if len(group) == batch_size or held >= HELD_BATCHES * batch_size:
            fullest = max(waiting, key=lambda size: len(waiting[size]))
            held -= len(waiting[fullest])
            yield _batch(waiting.pop(fullest))
    for group in waiting.values():
        yield _batch(group)


def _batch(group: list[tuple[int, Image.Image]]) -> Batch:
    rows, images = zip(*group, strict=True)
    return list(rows), Media.from_pil(images)


def _decoded(
    pictures: Sequence[Any], ahead: int, max_pixels: int
) -> Generator[Image.Image | PictureError, None, None]:
    """Every picture in order; threads decode files, at most ``ahead`` pictures early."""
    queue: deque[Any] = deque()
    with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), "decode") as pool:
        try:
            for picture in pictures:
                # A Pillow image may be listed twice and loads itself lazily: not in two threads.
                in_memory = isinstance(picture, Image.Image)
                queue.append(picture if in_memory else pool.submit(_tried, picture, max_pixels))
                if len(queue) > ahead:
                    yield _result(queue.popleft())
            while queue:
                yield _result(queue.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _tried(path: Path, max_pixels: int) -> Image.Image | PictureError:
    try:
        return read_picture(path, max_pixels)
    except PictureError as error:
        return error


def _result(item: Any) -> Image.Image | PictureError:
    if isinstance(item, Future):
        return item.result()  # type: ignore[no-any-return]
    try:
        return to_rgb(item)
    except (OSError, ValueError) as error:
        return PictureError(f"a Pillow image of mode {item.mode}: {error}")


@contextmanager
def _pixel_bound(max_pixels: int) -> Iterator[None]:
    """Let Pillow open what we were asked to read; its bound is global, so it is put back."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None if before is None else max(before, max_pixels)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
