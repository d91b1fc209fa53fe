"""A killed training continues to the same bits; the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

COMMON = (
    "device=cpu", "fit.epochs=40", "fit.patience=0", "fit.save_every=20", "fit.batch_size=8",
    "head.features=image", "head.dropout=0.2",
)  # fmt: skip


def start(root: Path, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmalign", "train-reward", *args]
    env = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_when(process: subprocess.Popen[str], path: Path) -> None:
    for _ in range(6000):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_continued(pairs_file: Path, open_clip_folder: Path, root: Path) -> None:
    where = [f"data={pairs_file}", f"backbone.checkpoint={open_clip_folder}"]
    cache = f"cache_dir={pairs_file.parent / 'cache'}"
    killed, whole = pairs_file.parent / "killed", pairs_file.parent / "whole"
    process = start(root, *where, *COMMON, cache, "--output-dir", str(killed))
    kill_when(process, killed / "state.pt")
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "reward.json").exists()
    done = start(root, *where, *COMMON, cache, "--output-dir", str(killed))
    out, err = done.communicate(timeout=250)
    assert done.returncode == 0, err
    assert "continuing" in err and "test accuracy 0." in out

    # A process of its own too: what other tests have set in this one may change roundings.
    done = start(root, *where, *COMMON, cache, "--output-dir", str(whole))
    assert done.communicate(timeout=250) and done.returncode == 0
    assert (killed / "head.safetensors").read_bytes() == (whole / "head.safetensors").read_bytes()
    assert json.loads((killed / "reward.json").read_text()) == json.loads(
        (whole / "reward.json").read_text()
    )
    assert (killed / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()


def test_the_command_names_mistakes(cli: Any, tmp_path: Path) -> None:
    done = cli("train-reward", "data=x.jsonl", "backbone.chekpoint=y")
    assert done.returncode == 2 and "Did you mean 'backbone.checkpoint'" in done.stderr
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: x.jsonl\nbackbone: {checkpoint: y}\n")
    shown = cli("train-reward", str(recipe), "--show", "--output-dir", "here", "loss.name=focal")
    assert shown.returncode == 0
    assert "output_dir: here" in shown.stdout and "name: focal" in shown.stdout


@pytest.mark.parametrize("missing", ["data", "backbone"])
def test_required_settings(cli: Any, missing: str) -> None:
    given = {"data": "data=x.jsonl", "backbone": "backbone.checkpoint=y"}
    done = cli("train-reward", *(v for k, v in given.items() if k != missing))
    assert done.returncode == 2 and f"missing key '{missing}'" in done.stderr
