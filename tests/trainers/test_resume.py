"""A run that is killed, for real, and resumed ends as one that was never killed, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mmalign.config import ConfigError, dump_yaml
from mmalign.runtime.log import read_jsonl
from trainers import checkpoint, entry

STEPS = 8
SCRIPT = """
import sys, time
import torch
torch.set_num_threads(1)
from trainers import entry
from vision_rewards.function import FunctionReward

recipe, pause = sys.argv[1], float(sys.argv[2])

def brightness(media, prompts):
    time.sleep(pause)
    return media.flatten(1).mean(1)

entry.train(entry.resolve_recipe(recipe), reward=FunctionReward(brightness, takes="tensor"))
"""


def recipe(kit, folder: Path, **changes):
    """Everything that carries state: prompts that return, tracker, EMA, two updates, a window."""
    prompts = folder.parent / "prompts.txt"
    words = ("red star", "blue circle", "green cross", "two circles", "yellow heart")
    prompts.write_text("".join(f"a photo of a {w}\n" for w in words))
    values = {
        "steps": STEPS,
        "save_every": 2,
        "images_per_prompt": 6,
        "prompts__source": str(prompts),
        "advantage__baseline": "tracker",
        "model__ema_decay": 0.9,
        "optim__updates_per_rollout": 2,
        "optim__lr": 1e-2,
        "optim__warmup": 3,
        "objective": {"kl_beta": 0.01, "clip_range": 1e-3},
        "rollout__train": "window",
        "rollout__window": 1,
        "rollout__window_start": (0, 1),
    }
    return kit.cheap(folder, **{**values, **changes})


def launch(config, pause: float) -> subprocess.Popen:
    """Train in a process of its own."""
    folder = Path(config.output_dir)
    script, file = folder.parent / "run.py", folder.parent / f"{folder.name}.yaml"
    script.write_text(SCRIPT)
    file.write_text(dump_yaml(config))
    root = str(Path(entry.__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RANK": "0"}
    command = [sys.executable, str(script), str(file), str(pause)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def kill_after(process: subprocess.Popen, log: Path, step: int) -> None:
    """SIGKILL as soon as the log shows ``step``."""
    deadline = time.monotonic() + 120
    while not any(r["step"] >= step for r in read_jsonl(log)):
        if process.poll() is not None:
            raise AssertionError(f"the run ended by itself:\n{process.stderr.read()}")
        assert time.monotonic() < deadline, "the run is stuck"
        time.sleep(0.01)
    process.kill()
    process.communicate()


def state(folder: Path) -> dict:
    """The newest checkpoint without the one thing that is never the same: seconds."""
    found = checkpoint.existing(folder / "checkpoints")[-1]
    held = torch.load(found / checkpoint.FILE, weights_only=True)
    held.pop("seconds")
    return held


def assert_identical(a, b, path: str = "") -> None:
    """Equal in structure, type and every bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.equal(b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{path}.{i}")
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def killed(kit, tmp_path_factory) -> SimpleNamespace:
    """A run killed after step 5 and what it left, then resumed to its end; its undisturbed twin."""
    base = tmp_path_factory.mktemp("resume")
    config = recipe(kit, base / "killed")
    folder = base / "killed"
    kill_after(launch(config, pause=0.4), folder / "metrics.jsonl", 5)
    left = [p.name for p in checkpoint.existing(folder / "checkpoints")]
    logged = [r["step"] for r in read_jsonl(folder / "metrics.jsonl")]
    again = launch(config, pause=0.0)
    _, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    torch.set_num_threads(1)
    whole = entry.train(recipe(kit, base / "whole"), reward=kit.brightness)
    return SimpleNamespace(
        folder=folder, whole=whole, config=config, left=left, logged=logged, errors=errors
    )


def test_work_was_lost_and_found_again(killed):
    assert killed.logged[-1] >= 5 and killed.left[-1] == "step_000004"
    assert "resuming" in killed.errors and "at step 4 of 8" in killed.errors


def test_weights_are_those_of_a_run_never_killed(killed):
    file = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    exported = load_file(killed.whole / file)
    assert_identical(load_file(killed.folder / file), exported)
    held = state(killed.whole)
    assert not exported["proj_out.bias"].equal(held["model"]["weights"]["proj_out.bias"])  # EMA


def test_whole_state_is_that_of_a_run_never_killed(killed):
    held, wanted = state(killed.folder), state(killed.whole)
    assert wanted["step"] == STEPS and wanted["updates"] == 2 * STEPS
    assert len(wanted["optimizer"]["state"]) > 10 and len(wanted["tracker"]) == 5
    assert_identical(held, wanted)


def test_log_holds_every_step_once(killed):
    log, wanted = (read_jsonl(f / "metrics.jsonl") for f in (killed.folder, killed.whole))
    assert [r["step"] for r in log] == list(range(1, STEPS + 1))
    for got, right in zip(log, wanted, strict=True):
        timed = {k for k in right if k == "seconds" or k.startswith("time/")}
        assert {k: got[k] for k in right.keys() - timed} == {
            k: right[k] for k in right.keys() - timed
        }


def snapshot(folder: Path) -> dict[str, bytes]:
    """The files a finished run must not change."""
    kept = [folder / "metrics.jsonl", folder / "config.yaml", *folder.rglob("*.safetensors")]
    return {p.name: p.read_bytes() for p in [*kept, *folder.rglob(checkpoint.FILE)]}


def test_resuming_a_finished_run_changes_nothing(kit, killed):
    before = snapshot(killed.folder)
    entry.train(killed.config, reward=kit.brightness)
    assert snapshot(killed.folder) == before
    assert json.loads((killed.folder / "run.json").read_text())["finished"] is True


def test_torn_checkpoints_are_ignored(kit, killed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(killed.whole, folder)
    checkpoints = folder / "checkpoints"
    (checkpoints / "step_000099").mkdir()
    partial = checkpoints / ".step_000010.partial-4194305"  # beyond any process id
    partial.mkdir()
    (partial / checkpoint.FILE).write_bytes(b"half")
    swapped = checkpoints / f".step_{STEPS:06d}.replaced"  # killed between two renames
    (checkpoints / f"step_{STEPS:06d}").rename(swapped)
    trainer = entry.build(recipe(kit, folder), folder, kit.brightness)
    assert trainer.resume() and trainer.step == STEPS
    assert not partial.exists() and not swapped.exists()


def test_more_steps_continue_the_run(kit, killed, tmp_path):
    folder = tmp_path / "extended"
    shutil.copytree(killed.whole, folder)
    dials = {"steps": STEPS + 1, "save_every": 3, "keep_checkpoints": 1}
    extended = replace(killed.config, output_dir=str(folder), **dials)
    entry.train(extended, reward=kit.brightness)
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl")] == list(range(1, STEPS + 2))
    assert [p.name for p in checkpoint.existing(folder / "checkpoints")] == [
        f"step_{STEPS + 1:06d}"
    ]
    first, last = state(killed.whole), state(folder)
    assert last["updates"] == first["updates"] + 2
    name = "proj_out.bias"
    assert not last["model"]["weights"][name].equal(first["model"]["weights"][name])


def test_a_folder_belongs_to_one_run(kit, killed):
    before = snapshot(killed.folder)
    for changes, words in (
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"optim": replace(killed.config.optim, lr=0.5)}, r"optim\.lr is 0\.01 there and 0\.5"),
    ):
        with pytest.raises(ConfigError, match=words):
            entry.train(replace(killed.config, **changes), reward=kit.brightness)
    with pytest.raises(ConfigError, match="already holds a run"):
        entry.train(killed.config, reward=kit.brightness, resume=False)
    assert snapshot(killed.folder) == before


def test_a_folder_of_unknown_origin_is_left_alone(kit, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"checkpoints but no config\.yaml"):
        entry.train(kit.cheap(tmp_path), reward=kit.brightness)
