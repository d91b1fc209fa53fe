"""The run's own record: one JSON object a line, always on, readable after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mmalign.runtime.files import atomic_write_bytes, make_directory, storage_errors


class LogError(ValueError):
    """A log file that is damaged elsewhere than in its last line."""


def say(message: str) -> None:
    """One time-stamped line on standard error; only the first process of a run speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Every record of a log; a torn last line, which a kill leaves, is dropped.

    A missing file is an empty log.

    Raises:
        LogError: another line is not a JSON object; the message names it.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    if torn.strip() and _is_record(torn):  # whole, only its newline is missing
        lines.append(torn)
    return [_parse(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise LogError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise LogError(f"{path}, line {number}: expected an object, got {type(record).__name__}")
    return record


def truncate_jsonl(path: str | Path, step: int | None = None, key: str = "step") -> int:
    """Drop a torn last line and, with ``step``, every record whose ``key`` is beyond it.

    Records without ``key`` stay. Returns the number of records kept. A resumed run calls this, so
    that the steps it repeats are not in the log twice.
    """
    path = Path(path)
    if not path.exists():
        return 0
    records = read_jsonl(path)
    kept = [r for r in records if step is None or key not in r or r[key] <= step]
    data = "".join(_line(r) for r in kept).encode()
    if data != path.read_bytes():
        atomic_write_bytes(path, data)
    return len(kept)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "tolist"):  # tensors and numpy arrays, scalars included
        return value.tolist()
    if isinstance(value, (Path, set, frozenset)):
        return str(value) if isinstance(value, Path) else sorted(value)
    raise TypeError(f"cannot log a {type(value).__name__}: {value!r}")


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(dict(record), ensure_ascii=False, default=_plain) + "\n"


class JsonlLog:
    """An append-only log, flushed after every record.

    Opening repairs a torn last line; with ``resume_step`` it also drops later steps.
    NaN and infinities are kept as Python's JSON reads and writes them.

    Raises:
        StorageError: disk full, read-only or no permission.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        make_directory(self.path.parent)
        truncate_jsonl(self.path, resume_step)
        with storage_errors(self.path):
            self._file = self.path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; tensors, numpy values, paths and dataclasses become plain data."""
        with storage_errors(self.path):
            self._file.write(_line(record).encode())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
