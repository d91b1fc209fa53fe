"""The file that labelling writes: one JSON object a line, only ever added to.

A line is one decision of one person about one showing of a pair::

    {"prompt", "image_a", "image_b", "label", "user", "seconds", "time",
     "decision": "<pair>-<round>-<user>", "round": 0, "shown": "ba", ...}

``label`` is ``a``, ``b``, ``tie``, ``skip`` (the person would not say) or ``undo`` (the decision is
taken back). Of lines with one ``decision`` the last stands, so nothing is ever erased and
:func:`standing` has the final word; ``shown`` says which picture was on the left. A pair that was
shown again has ``round`` 1.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.runtime.files import make_directory, storage_errors
from mmalign.runtime.log import read_jsonl

CHOICES = ("a", "b", "tie", "skip")
UNDO = "undo"
_SILENT = ("skip", UNDO)  # what stands in the file but is no judgement

Row = Mapping[str, Any]


class LabelFileError(ValueError):
    """A file of labels that cannot be used; the message says what to do."""


def pair_key(prompt: str, image_a: str, image_b: str) -> str:
    """What names a pair, whichever of its pictures is called a."""
    text = json.dumps([prompt, *sorted((image_a, image_b))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def last_lines(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """Numbered lines without those that a later line of the same decision replaced."""
    last = {str(row["decision"]): n for n, row in enumerate(rows, 1) if "decision" in row}
    return [
        (n, row)
        for n, row in enumerate(rows, 1)
        if "decision" not in row or last[str(row["decision"])] == n
    ]


def standing(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """Numbered lines that are judgements: no replaced line, nothing skipped or taken back.

    Lines without ``decision``, from elsewhere, all stay.
    """
    return [
        (number, row)
        for number, row in last_lines(rows)
        if "decision" not in row or row.get("label") not in _SILENT
    ]


class LabelFile:
    """The open file: a line is on the disk before :meth:`append` returns.

    Opening mends a last line that a kill cut short and locks the file against a second writer.

    Args:
        path: made, with its folders, where it does not exist.

    Raises:
        LabelFileError: another process writes it, or it holds lines from elsewhere.
        LogError: a line other than the last is not JSON.
        StorageError: disk full, read-only or no permission.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        make_directory(self.path.parent)
        with storage_errors(self.path):
            self._file = self.path.open("a+b", buffering=0)
        try:
            _lock(self._file.fileno(), self.path)
            self.rows = _ours(read_jsonl(self.path), self.path)
            self._mend()
        except BaseException:
            self._file.close()
            raise

    def _mend(self) -> None:
        """End the file with a whole line; in place, for a new file would not hold the lock."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        torn = data[whole:]
        if not torn:
            return
        try:
            json.loads(torn)
            self._write(b"\n")
        except ValueError:
            self._file.truncate(whole)

    def append(self, row: Row) -> None:
        """Add a line; after an error the file is as it was.

        Raises:
            StorageError: disk full, read-only or no permission.
        """
        with storage_errors(self.path):
            self._write((json.dumps(dict(row), ensure_ascii=False) + "\n").encode())

    def _write(self, data: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(28, "no space left")  # the only way a plain file takes a part
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(size)
            raise

    def close(self) -> None:
        """Close the file and give up its lock; a second call does nothing."""
        self._file.close()


def _ours(rows: Sequence[Row], path: Path) -> list[Row]:
    for number, row in enumerate(rows, 1):
        if "decision" not in row or row.get("label") not in (*CHOICES, UNDO):
            raise LabelFileError(
                f"{path}, line {number}: not written by labelling (no 'decision', or a label that "
                "is none of its own); choose another --out, so that nothing there is mixed up"
            )
    return list(rows)


def _lock(handle: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # a platform without it; nothing else there guards against two writers
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LabelFileError(
            f"{path} is being written by another labelling server; stop that one, or choose "
            "another --out"
        ) from error
