"""The JSONL log survives kills and resumes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.runtime.log import JsonlLog, LogError, read_jsonl, say, truncate_jsonl


def test_write_and_read(tmp_path):
    file = tmp_path / "run" / "log.jsonl"
    with JsonlLog(file) as log:
        log.write({"step": 1, "loss": torch.tensor(0.5), "text": "é"})
        assert read_jsonl(file) == [{"step": 1, "loss": 0.5, "text": "é"}]  # flushed, not closed
        log.write({"a": np.float32(0.25), "b": torch.tensor([1, 2]), "c": Path("x"), "d": {"z"}})
    assert read_jsonl(file)[1] == {"a": 0.25, "b": [1, 2], "c": "x", "d": ["z"]}


def test_nan_survives(tmp_path):
    with JsonlLog(tmp_path / "l") as log:
        log.write({"x": float("nan"), "y": float("inf")})
    record = read_jsonl(tmp_path / "l")[0]
    assert math.isnan(record["x"]) and record["y"] == math.inf


def test_what_cannot_be_logged_is_named(tmp_path):
    with JsonlLog(tmp_path / "l") as log, pytest.raises(TypeError, match="cannot log a object"):
        log.write({"x": object()})


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\xff\x00", b'{"step": 3,\n'[:-1]])
def test_torn_last_line_is_dropped(tmp_path, torn):
    file = tmp_path / "l"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert [r["step"] for r in read_jsonl(file)] == [1, 2]
    with JsonlLog(file) as log:
        log.write({"step": 4})
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 4}\n'


def test_whole_line_without_newline_is_kept(tmp_path):
    file = tmp_path / "l"
    file.write_bytes(b'{"step": 1}\n{"step": 2}')
    JsonlLog(file).close()
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_resume_drops_later_steps_only(tmp_path):
    file = tmp_path / "l"
    with JsonlLog(file) as log:
        for record in ({"event": "start"}, {"step": 1}, {"step": 2}, {"step": 3}):
            log.write(record)
    with JsonlLog(file, resume_step=2) as log:
        log.write({"step": 3, "again": True})
    expected = [{"event": "start"}, {"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert read_jsonl(file) == expected


def test_damage_elsewhere_is_an_error(tmp_path):
    file = tmp_path / "l"
    file.write_bytes(b'{"a": 1}\nbroken\n{"a": 2}\n')
    with pytest.raises(LogError, match="line 2"):
        read_jsonl(file)
    file.write_bytes(b"[1]\n")
    with pytest.raises(LogError, match="line 1: expected an object"):
        read_jsonl(file)


def test_missing_log_is_empty(tmp_path):
    assert read_jsonl(tmp_path / "none") == []
    assert truncate_jsonl(tmp_path / "none", 3) == 0


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say("no")
    monkeypatch.setenv("RANK", "0")
    say("yes")
    assert capsys.readouterr().err.endswith("] yes\n")
