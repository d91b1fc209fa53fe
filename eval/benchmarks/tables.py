"""Reading official files: lines, tables and JSON, with the place of what is broken."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.base import DataError, RowError


def one_file(data: Path, *names: str) -> Path:
    """``data`` itself, or the first of ``names`` in it where it is a folder.

    Raises:
        DataError: a folder without any of them.
    """
    if data.is_file():
        return data
    found = [data / name for name in names if (data / name).is_file()]
    if not found:
        raise DataError(f"{data} holds none of {', '.join(names)}; give the file itself")
    return found[0]


def text_of(path: Path) -> str:
    """UTF-8 text, a byte-order mark removed. Raises :class:`DataError` on other encodings."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from error


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of every line that is not empty."""
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if line.strip():
            yield f"{path.name}, line {number}", line.strip()


def json_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of every line of a JSON lines file; parse them with :func:`parsed`."""
    yield from lines_of(path)


def parsed(text: str) -> dict[str, Any]:
    """A JSON object. Raises :class:`RowError` where it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(value, dict):
        raise RowError(f"expected a JSON object, got {type(value).__name__}")
    return value


def json_of(path: Path) -> Any:
    """A whole JSON file. Raises :class:`DataError` where it is none."""
    try:
        return json.loads(text_of(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error.msg}, line {error.lineno})") from error


def table_rows(
    path: Path, columns: Sequence[str], *, tabs: bool = False
) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and cells of every row of a CSV file, or of a TSV file without quoting.

    Raises:
        DataError: a column is missing, or the file has no header.
    """
    # PartiPrompts' tab-separated file has quotes that are part of the prompts.
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.DictReader(text_of(path).splitlines(keepends=True), **options)
    missing = [c for c in columns if c not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path}: no column {missing[0]!r}; it has {reader.fieldnames}")
    for row in reader:
        yield f"{path.name}, line {reader.line_num}", row


def header_of(path: Path) -> list[str]:
    """The column names of a CSV file; none where it is empty."""
    return next(csv.reader(text_of(path).splitlines(keepends=True)), [])


def cell(row: dict[str, str], column: str) -> str:
    """A cell that is not empty. Raises :class:`RowError`."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"column {column!r} is empty or missing")
    return value.strip()
