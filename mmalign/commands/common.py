"""What several commands need: tables, prompts and pictures from text."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class CommandError(ValueError):
    """Command-line arguments that parse but make no sense together."""


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Plain aligned columns; numbers to the right, no line shortened."""
    cells = [[_cell(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *cells]) for i in range(len(header))]
    numeric = [any(isinstance(r[i], (int, float)) for r in rows) for i in range(len(header))]
    lines = []
    for row in [list(header), *cells]:
        padded = (
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(row, widths, numeric, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def prompts_of(args: Namespace) -> list[str] | None:
    """Prompts from ``--prompt`` or ``--prompts``; ``None`` where neither was given."""
    from mmalign.prompts import read_prompts

    if args.prompts is not None:
        return read_prompts(args.prompts)
    return None if args.prompt is None else [args.prompt]


def image_files(paths: Sequence[str]) -> list[Path]:
    """Files as given; the pictures in a folder and in the folders inside it.

    Those of a folder come in natural order of their names below it (``2.png`` before ``10.png``,
    ``a/9.png`` before ``b/1.png``), its own before those of inner folders. Folders and files whose
    names begin with a dot are left out; links to folders are followed, each folder once.

    Raises:
        CommandError: a path that does not exist, or a folder without pictures.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = list(_pictures_below(path, set()))
            if not found:
                raise CommandError(f"folder {path} holds no picture ({', '.join(IMAGE_SUFFIXES)})")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise CommandError(f"no picture or folder {path}")
    return files


def _pictures_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    if (real := folder.resolve()) in seen:  # a link back to where we came from
        return
    seen.add(real)
    inside = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=_natural)
    folders = dict.fromkeys(p for p in inside if p.is_dir())
    yield from (p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES and p not in folders)
    for inner in folders:
        yield from _pictures_below(inner, seen)


def short_names(files: Sequence[Path], given: Sequence[str]) -> list[str]:
    """Names of ``files`` below the folders of ``given`` that they were found in, as ``a/1.png``."""
    folders = [p for p in map(Path, given) if p.is_dir()]
    names = []
    for file in files:
        inside = next((f for f in folders if file.is_relative_to(f)), file.parent)
        names.append(file.relative_to(inside).as_posix())
    return names


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts]


def given(**options: object) -> dict[str, object]:
    """Only the options that were set, so that the function's own defaults stay in one place."""
    return {name: value for name, value in options.items() if value is not None}
