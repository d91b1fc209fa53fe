"""What several commands need: tables, prompts and pictures from text."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
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
    """Files as given; the pictures of a folder in natural order (``2.png`` before ``10.png``).

    Raises:
        CommandError: a path that does not exist, or a folder without pictures.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
            if not found:
                raise CommandError(f"folder {path} holds no picture ({', '.join(IMAGE_SUFFIXES)})")
            files += sorted(found, key=_natural)
        elif path.is_file():
            files.append(path)
        else:
            raise CommandError(f"no picture or folder {path}")
    return files


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]


def given(**options: object) -> dict[str, object]:
    """Only the options that were set, so that the function's own defaults stay in one place."""
    return {name: value for name, value in options.items() if value is not None}
