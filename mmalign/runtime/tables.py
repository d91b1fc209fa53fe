"""Tables on disk: JSON lines, CSV or Parquet by the suffix, written whole or not at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.runtime.extras import optional
from mmalign.runtime.files import atomic_path

Rows = Sequence[Mapping[str, Any]]
Columns = Mapping[str, type]  # str, float or bool, by name
FORMATS = (".jsonl", ".ndjson", ".csv", ".parquet")


class TableFormatError(ValueError):
    """A file whose suffix names no format of tables."""


def check_table_path(path: str | Path) -> None:
    """Refuse, before anything is computed, what :func:`write_table` could not write.

    Raises:
        TableFormatError: an unknown suffix.
        MissingExtraError: Parquet without pyarrow.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise TableFormatError(
            f"{path}: {suffix or 'no suffix'!r} names no table format; use {', '.join(FORMATS)}"
        )
    if suffix == ".parquet":
        _pyarrow("pyarrow")


def write_table(
    path: str | Path, rows: Rows, columns: Columns, metadata: Mapping[str, str]
) -> None:
    """Write ``rows`` atomically; ``None`` is null in JSON and Parquet and an empty cell in CSV.

    Args:
        path: ``.jsonl`` (``.ndjson``), ``.csv`` or ``.parquet``.
        rows: one mapping each. JSON lines keep them as they are, nested values included.
        columns: name and type of the columns of CSV and Parquet, in order.
        metadata: kept in the file's own metadata where the format has it (Parquet).

    Raises:
        TableFormatError, MissingExtraError: as :func:`check_table_path`.
        StorageError: disk full, read-only or no permission.
    """
    check_table_path(path)
    suffix = Path(path).suffix.lower()
    with atomic_path(path) as partial:
        if suffix == ".csv":
            _write_csv(partial, rows, columns)
        elif suffix == ".parquet":
            _write_parquet(partial, rows, columns, metadata)
        else:
            lines = (json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in rows)
            partial.write_text("".join(lines), encoding="utf-8")


def _write_csv(path: Path, rows: Rows, columns: Columns) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)


def _cell(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _write_parquet(path: Path, rows: Rows, columns: Columns, metadata: Mapping[str, str]) -> None:
    arrow, parquet = _pyarrow("pyarrow"), _pyarrow("pyarrow.parquet")
    kinds = {str: arrow.string(), float: arrow.float64(), bool: arrow.bool_()}
    # Types are stated: a column of which every value is null has none of its own.
    schema = arrow.schema([(n, kinds[t]) for n, t in columns.items()], metadata=dict(metadata))
    values = {name: [row.get(name) for row in rows] for name in columns}
    parquet.write_table(arrow.table(values, schema=schema), path)


def _pyarrow(module: str) -> Any:
    return optional(module, "parquet", "a .parquet file")
