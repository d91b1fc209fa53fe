"""Rows of benchmark files: Parquet with pictures inside, JSON, JSON lines and CSV with paths.

Pictures in Parquet are read again when they are needed, so that a benchmark larger than memory
works; their digests are taken while the file is read through once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from eval.reward_benchmarks.base import DataError, RowError
from eval.reward_benchmarks.items import Candidate, bytes_candidate, file_candidate
from mmalign.runtime.extras import optional

FOLDERS = ("", "images", "image", "videos", "test")  # where files named in a table are looked for
BATCH = 16  # rows of Parquet in memory while a file is read through
_MISSING = object()


@dataclass(frozen=True)
class Row:
    """One row: its values, the folder its paths start from, and where it stands in Parquet.

    ``broken`` says why there are no values.
    """

    values: Mapping[str, Any]
    root: Path
    cell: tuple[Path, int, int] | None = None
    broken: str = ""

    def value(self, *names: str, default: Any = _MISSING) -> Any:
        """The first of these columns that is there and not null.

        Raises:
            RowError: none of them; names those that are there.
        """
        if self.broken:
            raise RowError(self.broken)
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is not _MISSING:
            return default
        has = ", ".join(k for k, v in self.values.items() if v is not None)
        raise RowError(f"no {' or '.join(map(repr, names))}; the row has {has or 'nothing'}")

    def text(self, *names: str, default: Any = _MISSING) -> str:
        """A non-empty text. Raises :class:`RowError`."""
        found = self.value(*names, default=default)
        if not isinstance(found, str) or (not found.strip() and found is not default):
            raise RowError(f"{names[0]} must be a text that is not empty, got {found!r}")
        return found

    def number(self, *names: str) -> float:
        """A finite number; text that holds one is read. Raises :class:`RowError`."""
        found = self.value(*names)
        try:
            number = math.nan if isinstance(found, bool) else float(found)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RowError(f"{names[0]} must be a number, got {found!r}")
        return number

    def listed(self, *names: str, count: int | None = None) -> list[Any]:
        """A list, of ``count`` elements where that is given. Raises :class:`RowError`."""
        found = self.value(*names)
        if not isinstance(found, (list, tuple)) or (count is not None and len(found) != count):
            wanted = "a list" if count is None else f"a list of {count}"
            raise RowError(f"{names[0]} must be {wanted}, got {str(found)[:80]!r}")
        return list(found)

    def choice(self, choices: Mapping[Any, Any], *names: str) -> Any:
        """What one of the allowed values stands for. Raises :class:`RowError`."""
        found = self.value(*names)
        key = found.strip() if isinstance(found, str) else found
        if key not in choices:
            allowed = ", ".join(map(str, choices))
            raise RowError(f"{names[0]} must be one of {allowed}, got {found!r}")
        return choices[key]

    def picture(self, name: str, place: int | None = None, maker: str = "") -> Candidate:
        """The picture (or video) in a column, or at a place of a column of lists.

        Raises:
            RowError: no picture there, or its file does not exist.
        """
        held = self.value(name) if place is None else self.listed(name)[place]
        path, data = _held(held)
        if data is not None:
            if self.cell is None:
                return bytes_candidate(data, maker)
            key = hashlib.sha256(data).hexdigest()[:32]
            again = partial(_again, *self.cell, name, place)
            where = f"{self.cell[0].name}, row group {self.cell[1]}, row {self.cell[2]}, {name}"
            return Candidate(key, again, maker=maker, place=where)
        if not path:
            raise RowError(f"{name} holds no picture: {type(held).__name__}")
        return self.file(path, maker)

    def file(self, path: str, maker: str = "", suffixes: Sequence[str] = ("",)) -> Candidate:
        """A file below the root (or in its folders of pictures), with one of the suffixes.

        Raises:
            RowError: there is none.
        """
        local = path.rpartition("/")[2] if "://" in path else path
        for folder in FOLDERS:
            for suffix in suffixes:
                found = self.root / folder / f"{local}{suffix}"
                if found.exists():
                    return file_candidate(found, self.root, maker)
        hint = " (download it there first)" if "://" in path else ""
        tried = ", ".join(folder for folder in FOLDERS if folder)
        raise RowError(f"{path} is not below {self.root}, nor in its {tried}{hint}")

    def size(self, name: str) -> tuple[int, int]:
        """Width and height of the picture in a column. Raises :class:`RowError`."""
        _, data = _held(self.value(name))
        try:
            candidate = self.picture(name)
            if data is None and isinstance(candidate.source, Path):
                data = candidate.source.read_bytes()
            with Image.open(io.BytesIO(data or b"")) as image:
                return image.size
        except OSError as error:
            raise RowError(f"{name}: {error}") from error


def _held(value: Any) -> tuple[str, bytes | None]:
    """Path and bytes of a picture as tables hold them: bytes, ``{"bytes", "path"}``, or a path."""
    if isinstance(value, bytes):
        return "", value
    if isinstance(value, Mapping):
        return str(value.get("path") or ""), value.get("bytes")
    return (value, None) if isinstance(value, str) else ("", None)


# --- files ------------------------------------------------------------------------------------


def find(data: Path, *patterns: str) -> list[Path]:
    """The file itself, or the files of a folder that match the first pattern that any matches.

    Raises:
        DataError: none does.
    """
    if data.is_file():
        return [data]
    for pattern in patterns:
        found = sorted(data.glob(pattern))
        if found:
            return found
    raise DataError(f"{data} holds no {' or '.join(patterns)}")


def read_rows(path: Path, root: Path | None = None) -> Iterator[tuple[str, Row]]:
    """Place and content of every row of a ``.parquet``, ``.jsonl``, ``.json`` or ``.csv`` file.

    A line of JSON that is broken comes as an empty row, which every reader refuses by name.

    Raises:
        DataError: another kind of file, or one that is broken as a whole.
        MissingExtraError: Parquet without pyarrow.
    """
    root = root or path.parent
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, root)
        return
    readers: dict[str, Callable[[Path], Iterable[Any]]] = {
        ".jsonl": _json_lines, ".json": _json, ".csv": _csv,
    }  # fmt: skip
    if suffix not in readers:
        allowed = ", ".join((*readers, ".parquet"))
        raise DataError(f"{path}: {suffix or 'no suffix'!r} is no table; use {allowed}")
    for number, values in enumerate(readers[suffix](path), 1):
        place = f"{path.name}, row {number}"
        if isinstance(values, dict):
            yield place, Row(values, root)
        else:
            kind = type(values).__name__
            said = str(values) if isinstance(values, RowError) else f"it is no object but a {kind}"
            yield place, Row({}, root, broken=said)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _json_lines(path: Path) -> Iterator[Any]:
    for line in _text(path).split("\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                yield RowError(f"it is not JSON ({error.msg} at column {error.colno})")


def _json(path: Path) -> Iterable[Any]:
    try:
        data = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from error
    if not isinstance(data, list):
        raise DataError(f"{path} holds a {type(data).__name__}; expected a list of rows")
    return data


def _csv(path: Path) -> Iterable[Any]:
    return csv.DictReader(io.StringIO(_text(path), newline=""))


def _parquet(path: Path, root: Path) -> Iterator[tuple[str, Row]]:
    parquet = optional("pyarrow.parquet", "parquet", f"{path.name}, a Parquet file,")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises its own kinds, OSError and ValueError
        raise DataError(f"{path} cannot be read as Parquet ({error})") from error
    number = 0
    for group in range(file.num_row_groups):
        inside = 0
        for batch in file.iter_batches(batch_size=BATCH, row_groups=[group]):
            for values in batch.to_pylist():
                number += 1
                yield f"{path.name}, row {number}", Row(values, root, (path, group, inside))
                inside += 1


def _again(path: Path, group: int, inside: int, column: str, place: int | None) -> Image.Image:
    """A picture that was seen in Parquet, read anew."""
    held = _column(path, group, column)[inside].as_py()
    _, data = _held(held if place is None else held[place])
    assert data is not None  # it was there when the file was read through
    return Image.open(io.BytesIO(data))


@lru_cache(maxsize=4)
def _column(path: Path, group: int, column: str) -> Any:
    parquet = optional("pyarrow.parquet", "parquet", f"{path.name}, a Parquet file,")
    return parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(0)
