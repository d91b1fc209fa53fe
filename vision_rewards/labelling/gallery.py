"""The pictures a labelling server shows, by number: a path never comes from the browser."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from mmalign.pictures import DECODERS, PictureError, read_picture
from mmalign.runtime.progress import track
from vision_rewards.labelling.tasks import Pair, TaskError

NAMED = 10  # broken pictures that an error names

# Formats that a browser shows as a reward model reads them; the rest is sent as PNG.
_AS_IT_IS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


class Gallery:
    """Pictures by number.

    Args:
        paths: the files, each once.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(dict.fromkeys(paths))
        self.number = {path: n for n, path in enumerate(self.paths)}

    def read(self, number: int) -> tuple[bytes, str]:
        """The bytes of a picture and their media type.

        Raises:
            LookupError: no picture has this number.
            PictureError: the file has gone or was damaged since the start.
        """
        if not 0 <= number < len(self.paths):
            raise LookupError(f"no picture {number}; there are {len(self.paths)}")
        path = self.paths[number]
        kind = _plain_format(path)
        if kind is not None:
            return path.read_bytes(), kind
        buffer = io.BytesIO()
        read_picture(path).save(buffer, format="PNG")
        return buffer.getvalue(), "image/png"


def _plain_format(path: Path) -> str | None:
    """The media type of a file that can be sent as it is: 8 bits, opaque, one frame."""
    try:
        with Image.open(path) as image:
            plain = image.mode in ("RGB", "L", "P") and not image.has_transparency_data
            plain = plain and getattr(image, "n_frames", 1) == 1
            return _AS_IT_IS.get(image.format or "") if plain else None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise PictureError(f"{path}: {type(error).__name__}: {error}") from error


def readable_pairs(
    pairs: Sequence[Pair], root: Path, *, skip_broken: bool = False, progress: bool = False
) -> tuple[list[Pair], list[str]]:
    """Pairs whose pictures both decode, and what is wrong with the others' pictures.

    Raises:
        TaskError: a picture cannot be read and ``skip_broken`` is off, or no pair is left.
    """
    paths = list(dict.fromkeys(file for p in pairs for file in p.files(root)))
    found: dict[Path, str | None] = {}
    with ThreadPoolExecutor(DECODERS) as pool, track("read", len(paths), 0, progress) as advance:
        for path, said in zip(paths, pool.map(_fault, paths), strict=True):
            found[path] = said
            advance(1)
    broken = [said for said in found.values() if said is not None]
    if broken and not skip_broken:
        rest = f"\n  and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise TaskError(
            f"{len(broken)} of {len(paths)} pictures cannot be read; mend them, or leave out their "
            "pairs with --skip-broken:\n  " + "\n  ".join(broken[:NAMED]) + rest
        )
    kept = [p for p in pairs if not any(found[file] for file in p.files(root))]
    if not kept:
        raise TaskError(f"no pair is left: all {len(pairs)} hold a picture that cannot be read")
    return kept, broken


def _fault(path: Path) -> str | None:
    if not path.is_file():
        return f"{path}: no such file"
    try:
        read_picture(path)
    except PictureError as error:
        return str(error)
    return None
