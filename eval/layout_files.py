"""What a folder layout is: names for pictures, found again and written."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from eval.clips import VIDEOS, encoded_clip
from mmalign.pictures import PictureError, read_picture
from mmalign.protocols import Request
from mmalign.runtime.files import atomic_write_bytes

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
JPEG = {"quality": 95, "subsampling": 0}  # JPEG loses detail whatever is done; least of it here
NAME_BYTES = 255  # of a file name on every common file system
SHOWN = 3  # names that a message gives as examples


class LayoutError(ValueError):
    """Pictures that a layout cannot name, or a folder that is not in it."""


@dataclass(frozen=True)
class Cell:
    """One picture of a folder: a file, or the cell ``(row, column, side)`` of a grid in it."""

    path: Path
    part: tuple[int, int, int] | None = None

    def open(self) -> Image.Image:
        """The picture as 8-bit RGB.

        Raises:
            PictureError: missing, damaged, or a grid whose sides do not divide.
        """
        image = read_picture(self.path)
        if self.part is None:
            return image
        row, column, side = self.part
        if image.width % side or image.height % side:
            size = f"{image.width} x {image.height}"
            raise PictureError(f"{self.path}: {size} pixels are no grid of {side} x {side} cells")
        width, height = image.width // side, image.height // side
        return image.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


@dataclass(frozen=True)
class Found:
    """What a folder holds: the picture of each request's key, and what is odd, in words."""

    cells: Mapping[str, Cell]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One file for each picture, named by ``stem``.

    Attributes:
        stem: path of a request's picture below the folder, without its suffix.
        suffix: what is written; ``suffixes`` are read, in this order.
        samples: pictures that the layout has for each prompt; ``None`` is any number.
        beside: files that belong to the layout and hold no picture of their own.
    """

    name: str
    stem: Callable[[Request], str]
    suffix: str = ".png"
    suffixes: tuple[str, ...] = PICTURES
    samples: int | None = None
    beside: tuple[str, ...] = ()

    def read(self, folder: Path, requests: Sequence[Request]) -> Found:
        """The pictures of ``requests`` in ``folder``; what is missing is not among the cells.

        Raises:
            LayoutError: no folder, no picture in it, or requests that the layout cannot name.
        """
        if not folder.is_dir():
            raise LayoutError(f"{folder} is not a folder of pictures")
        self.check(requests)
        there = {p.relative_to(folder).as_posix(): p for p in self._files(folder)}
        if not there:
            endings = ", ".join(self.suffixes)
            raise LayoutError(f"{folder} holds no picture ({endings}) of layout {self.name!r}")
        cells, problems = self._match(folder, there, requests)
        return Found(cells, (*problems, *_strangers(there.values(), cells.values(), self.name)))

    def write(
        self, folder: Path, requests: Sequence[Request], pictures: Mapping[str, Path]
    ) -> list[Path]:
        """Copy ``pictures`` (by key; others are left out) to their official places.

        Raises:
            LayoutError: requests that the layout cannot name; before anything is written.
        """
        chosen = [r for r in requests if r.key in pictures]
        self.check(chosen)
        names = self._names(chosen)
        for request in chosen:
            data = encoded(pictures[request.key], self.suffix)
            atomic_write_bytes(folder / names[request.key], data)
        return [folder / name for name in names.values()]

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse requests that have no place, or share one.

        Raises:
            LayoutError: naming the request.
        """
        for r in requests:
            if self.samples is not None and r.sample >= self.samples:
                raise LayoutError(
                    f"layout {self.name!r} has {self.samples} picture(s) of a prompt, but "
                    f"{r.key!r} is number {r.sample}; use another layout or fewer samples"
                )
        seen: dict[str, str] = {}
        for key, name in self._names(requests).items():
            if name in seen:
                both = f"{seen[name]!r} and {key!r}"
                raise LayoutError(f"layout {self.name!r} gives {both} one name, {name}")
            if any(len(part.encode()) > NAME_BYTES for part in name.split("/")):
                raise LayoutError(f"layout {self.name!r}: too long for a file name: {name}")
            seen[name] = key

    def _files(self, folder: Path) -> list[Path]:
        found = (p for p in folder.rglob("*") if p.suffix.lower() in self.suffixes)
        return sorted(p for p in found if p.is_file() and p.name not in self.beside)

    def _names(self, requests: Sequence[Request]) -> dict[str, str]:
        return {r.key: f"{self.stem(r)}{self.suffix}" for r in requests}

    def _match(
        self, folder: Path, there: Mapping[str, Path], requests: Sequence[Request]
    ) -> tuple[dict[str, Cell], list[str]]:
        cells = {}
        for r in requests:
            tried = (there.get(f"{self.stem(r)}{s}") for s in self.suffixes)
            path = next((p for p in tried if p is not None), None)
            if path is not None:
                cells[r.key] = Cell(path)
        return cells, []


def _strangers(there: Iterable[Path], cells: Iterable[Cell], layout: str) -> tuple[str, ...]:
    claimed = {c.path for c in cells}
    odd = [p for p in there if p not in claimed]
    if not odd:
        return ()
    shown = ", ".join(map(str, odd[:SHOWN]))
    return (f"{len(odd)} pictures are of no request in layout {layout!r}, such as {shown}",)


def item_of(request: Request, layout: str) -> str:
    """The prompt's name in the official data.

    Raises:
        LayoutError: it has none.
    """
    if not request.item:
        raise LayoutError(
            f"layout {layout!r} names files by the prompt's number in the official data, which "
            f"{request.key!r} has not; use layout 'flat'"
        )
    return request.item


def encoded(path: Path, suffix: str) -> bytes:
    """A picture file as ``suffix``: its own bytes where they are in that format already."""
    if path.suffix.lower() == suffix:
        return path.read_bytes()
    if suffix in VIDEOS:
        return encoded_clip(path, suffix)
    return picture_bytes(read_picture(path), suffix)


def picture_bytes(image: Image.Image, suffix: str) -> bytes:
    """A picture as PNG, or as JPEG where ``suffix`` says so."""
    buffer = io.BytesIO()
    options = JPEG if suffix == ".jpg" else {}
    image.save(buffer, format="JPEG" if suffix == ".jpg" else "PNG", **options)
    return buffer.getvalue()
