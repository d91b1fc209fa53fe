"""Files that are whole or absent: atomic writes, and clear words when the disk says no."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


class StorageError(OSError):
    """Writing failed for a reason the user can mend; what was there before is untouched."""

    def __str__(self) -> str:
        return str(self.args[-1])


def free_bytes(path: str | Path) -> int:
    """Free space of the file system that holds ``path`` or its nearest existing parent."""
    path = Path(path).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn disk-full, read-only and permission errors into :class:`StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number not in _REASONS:
            raise
        free = free_bytes(path) / 1e6
        text = f"cannot write {path}: {_REASONS[number]} ({free:,.1f} MB free there)"
        raise StorageError(number, text) from error


def _error_number(error: Exception) -> int:
    """The system's number of an error; safetensors, written in Rust, gives it as text only."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def make_directory(path: str | Path) -> Path:
    """Create a folder and its parents. Raises :class:`StorageError` where that is refused."""
    path = Path(path)
    with storage_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            text = f"cannot create folder {path}: a file is in the way"
            raise StorageError(error.errno, text) from error
    return path


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary sibling to write to; on success it replaces ``path``, on error it is removed.

    Raises:
        StorageError: disk full, read-only or no permission.
    """
    path = Path(path)
    make_directory(path.parent)
    partial = _partial(path)
    with storage_errors(path):
        try:
            yield partial
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file that a kill can never leave half-written."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON atomically. ``value`` must be plain data."""
    atomic_write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary sibling folder to fill; on success it becomes ``path``.

    A folder already at ``path`` is replaced, and stays as it is when the body raises. If a kill
    falls between the two renames of a replacement, the next call puts the old folder back.

    Raises:
        StorageError: disk full, read-only or no permission.
    """
    path = Path(path)
    make_directory(path.parent)
    with storage_errors(path):
        recover_directory(path)
        partial = _partial(path)
        partial.mkdir()
        try:
            yield partial
            for item in sorted(partial.rglob("*"), reverse=True):
                _sync(item)
            _sync(partial)
            _replace_directory(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def recover_directory(path: str | Path) -> None:
    """Undo what a kill during :func:`atomic_directory` left beside ``path``."""
    path = Path(path)
    old = _old(path)
    if old.exists():
        if path.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, path)
    for leftover in path.parent.glob(f".{path.name}.partial-*"):
        if leftover.is_dir() and not _alive(leftover.name.rpartition("-")[2]):
            shutil.rmtree(leftover, ignore_errors=True)


def _replace_directory(partial: Path, path: Path) -> None:
    old = _old(path)
    if path.exists():
        os.rename(path, old)
    os.rename(partial, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _alive(pid: str) -> bool:
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; a folder only where the platform can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
