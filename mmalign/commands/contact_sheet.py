"""One picture to look at first: the unsteered pictures above the steered ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SMALLEST, LARGEST = 192, 384  # side of a picture on the sheet, pixels
MOST = 48  # prompts; the page has all of them
GAP, LINE, FONT = 8, 15, 12


def contact_sheet(
    folder: Path, records: Sequence[Mapping[str, Any]], columns: int = 6
) -> Image.Image:
    """The first 48 prompts of a steering run: unsteered, steered, both scores and the prompt.

    Args:
        folder: the run's folder, against which ``file`` and ``unsteered_file`` are read.
        records: lines of ``prompts.jsonl``, one or more.
    """
    records = records[:MOST]
    side = min(LARGEST, max(SMALLEST, *_read(folder / records[0]["file"]).size))
    columns = min(columns, len(records))
    labels = [_label(record, side) for record in records]
    deep = max(map(len, labels)) * LINE
    cell = side + GAP, 2 * side + GAP // 2 + deep + 2 * GAP
    rows = -(-len(records) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for i, (record, label) in enumerate(zip(records, labels, strict=True)):
        x, y = GAP + i % columns * cell[0], GAP + i // columns * cell[1]
        for file in ("unsteered_file", "file"):
            sheet.paste(_fitted(_read(folder / record[file]), side), (x, y))
            y += side + GAP // 2
        for line in label:
            draw.text((x, y), line.encode("ascii", "replace").decode(), fill="black", font=font)
            y += LINE
    return sheet


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = round(image.width * scale), round(image.height * scale)
    # Pixels of small pictures stay pixels.
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize(size, how)


def _label(record: Mapping[str, Any], side: int) -> list[str]:
    scores = " to ".join(
        "unscored" if value is None else f"{value:.3f}"
        for value in (record["unsteered_score"], record["score"])
    )
    wide = side // 6  # letters of a line
    return [scores, *wrap(record["prompt"], wide, max_lines=3, placeholder=" ...")]
