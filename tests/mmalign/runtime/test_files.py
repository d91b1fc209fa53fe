"""Atomic writes: whole or absent, with clear words when the disk says no."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mmalign.runtime.files import (
    StorageError,
    atomic_directory,
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    free_bytes,
    make_directory,
    storage_errors,
)


def test_writes_replace_and_leave_nothing_behind(tmp_path):
    file = tmp_path / "deep" / "x.txt"
    atomic_write_text(file, "é1")
    atomic_write_text(file, "é2")
    assert file.read_text(encoding="utf-8") == "é2"
    atomic_write_bytes(file, b"\x00")
    assert file.read_bytes() == b"\x00"
    atomic_write_json(file, {"a": [1, "é"]})
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": [1, "é"]}
    assert [p.name for p in file.parent.iterdir()] == ["x.txt"]


def test_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("number", "word"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")],
)
def test_storage_errors_are_explained(tmp_path, number, word):
    with pytest.raises(StorageError, match=word) as caught, atomic_path(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "x") in str(caught.value)
    assert "MB free" in str(caught.value)
    assert caught.value.errno == number


def test_other_os_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "no").read_text()


def test_a_real_full_disk():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this platform")
    with (
        pytest.raises(StorageError, match="disk is full"),
        storage_errors("/dev/full"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "x").write_text("")
    for path in (tmp_path / "x", tmp_path / "x" / "y"):
        with pytest.raises(StorageError, match="a file is in the way"):
            make_directory(path)


def test_free_bytes_of_a_path_that_does_not_exist(tmp_path):
    assert free_bytes(tmp_path / "no" / "where") > 0


def test_directory_appears_whole(tmp_path):
    target = tmp_path / "step-1"
    with atomic_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    with atomic_directory(target) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_failed_directory_keeps_the_old_one(tmp_path):
    target = tmp_path / "t"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(StorageError), atomic_directory(target):
        raise OSError(errno.ENOSPC, "full")
    assert [p.name for p in tmp_path.rglob("*")] == ["t", "old"]


def test_an_interrupted_replacement_is_undone(tmp_path):
    (tmp_path / ".t.replaced").mkdir()
    (tmp_path / ".t.replaced" / "old").write_text("")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "t"):
        assert (tmp_path / "t" / "old").exists()
        raise RuntimeError
    assert (tmp_path / "t" / "old").exists()


KILLED = """
import sys, time
from mmalign.runtime.files import atomic_directory
with atomic_directory(sys.argv[1]) as folder:
    (folder / "half").write_text("x")
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_killed_write_leaves_the_old_folder_and_is_cleaned_up(tmp_path, root):
    target = tmp_path / "t"
    target.mkdir()
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", KILLED, str(target)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(0.05)
    assert list(target.iterdir()) == []
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_directory(target) as folder:
        (folder / "whole").write_text("x")
    assert [p.name for p in tmp_path.rglob("*")] == ["t", "whole"]
