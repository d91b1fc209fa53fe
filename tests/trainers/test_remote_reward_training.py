"""Training on a reward server that dies, and scoring beside generation: equal parameters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmalign.cli import main
from mmalign.config import ConfigError, dump_yaml
from mmalign.runtime.log import read_jsonl
from mmalign.types import Score
from trainers import checkpoint, entry
from trainers.config import TrainConfig
from vision_rewards.guard import RewardFailedError, RewardUnavailableError

STEPS = 4
PATIENCE = 300  # seconds a process may take, on however busy a machine
REWARD = """
import time
from pathlib import Path
from mmalign.types import Media
from vision_rewards.shapes import ShapesPartial

calls = 0

def graded(images, prompts):
    '''The verifier plus brightness; from the third call on it waits for leave to answer.'''
    global calls
    calls += 1
    while calls > 2 and not Path("leave").exists():
        time.sleep(0.02)
    score = ShapesPartial().score(Media.from_pil(images), prompts)
    light = [i.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for i in images]
    return [v + b for v, b in zip(score.value.tolist(), light)]
"""
ROOT = Path(entry.__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def mmalign(folder: Path, *args: str) -> subprocess.Popen:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "mmalign", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=ENV, cwd=folder, text=True, **pipes)


@contextmanager
def server(folder: Path, port: int = 0):
    """``mmalign serve-reward``; yields the process and its address."""
    process = mmalign(folder, "serve-reward", "reward.py:graded", "--port", str(port))
    try:
        line = process.stdout.readline()
        found = re.search(r"at (http://\S+:(\d+))$", line)
        assert found, process.stderr.read()
        yield SimpleNamespace(process=process, url=found[1], port=int(found[2]))
    finally:
        process.kill()
        process.communicate()


def train(folder: Path, config: TrainConfig) -> subprocess.Popen:
    """``mmalign train`` of a recipe file."""
    (folder / "recipe.yaml").write_text(dump_yaml(config))
    return mmalign(folder, "train", "recipe.yaml", "--no-preflight", "--no-report")


def wait_for_step(process: subprocess.Popen, log: Path, step: int) -> None:
    """Return once the log shows ``step``."""
    until = time.monotonic() + PATIENCE
    while not any(r["step"] >= step for r in read_jsonl(log)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until, f"no step {step} in {log}"
        time.sleep(0.02)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Trained weights of the newest checkpoint."""
    file = checkpoint.existing(folder / "checkpoints")[-1] / checkpoint.FILE
    return torch.load(file, weights_only=True)["model"]["weights"]


def assert_equal_weights(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys() and one
    assert all(one[name].equal(two[name]) for name in one)


def assert_equal_logs(a: Path, b: Path) -> None:
    one, two = (read_jsonl(f / "metrics.jsonl") for f in (a, b))
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for x, y in zip(one, two, strict=True):
        timed = {k for k in x if k == "seconds" or k.startswith("time/")}
        assert {k: x[k] for k in x.keys() - timed} == {k: y[k] for k in y.keys() - timed}


@pytest.mark.slow
def test_killing_the_server_stops_cleanly_and_resuming_changes_nothing(
    kit, tmp_path, monkeypatch, capfd
):
    (tmp_path / "reward.py").write_text(REWARD)
    base = kit.cheap(tmp_path / "killed", steps=STEPS, evaluation__enabled=False, optim__lr=1e-2)
    folder = Path(base.output_dir)
    with server(tmp_path) as first:
        config = replace(base, reward={"reward": f"remote:{first.url}", "wait": 1.0})
        run = train(tmp_path, config)
        wait_for_step(run, folder / "metrics.jsonl", 2)
        first.process.kill()
        _, errors = run.communicate(timeout=PATIENCE)
    done = read_jsonl(folder / "metrics.jsonl")[-1]["step"]
    assert run.returncode == 2 and "Traceback" not in errors
    assert f"{first.url}: " in errors and "trying again for up to 1 s" in errors
    assert f"mmalign: error: no reward server answered for 1 s: {first.url}" in errors
    assert f"saved at step {done}" in errors and done == 2
    kept = [p.name for p in checkpoint.existing(folder / "checkpoints")]
    assert kept == [f"step_{done:06d}"]
    (tmp_path / "leave").touch()
    with server(tmp_path, first.port):
        monkeypatch.chdir(tmp_path)
        assert main(["train", "recipe.yaml", "--no-report"]) == 0
    assert f"at step {done} of {STEPS}" in capfd.readouterr().err
    whole = replace(base, output_dir=str(tmp_path / "whole"))
    entry.train(replace(whole, reward=f"{tmp_path / 'reward.py'}:graded"))
    assert_equal_weights(folder, Path(whole.output_dir))
    assert_equal_logs(folder, Path(whole.output_dir))
    first_step = weights(folder)["proj_out.bias"]
    start = entry.build(base, folder, kit.brightness).policy.denoiser.proj_out.bias
    assert not first_step.equal(start.detach())  # it did learn


class Failing:
    """A reward that draws from the global random state at every call, and is lost at one."""

    def __init__(self, inner, at: int | None) -> None:
        self.inner, self.at, self.calls = inner, at, 0
        self.info, self.identity = inner.info, inner.identity

    def score(self, media, prompts, context=None) -> Score:
        self.calls += 1
        luck = torch.rand(len(media))
        if self.calls == self.at:
            raise RewardUnavailableError("the server is gone")
        score = self.inner.score(media, prompts)
        return replace(score, value=score.value + 0.01 * luck)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("call", [1, 6])
def test_a_lost_reward_saves_the_last_finished_step(kit, tmp_path, overlap, call):
    changes = {"rollout__overlap": True, "rollout__batch_size": 4} if overlap else {}
    config = kit.cheap(tmp_path / "lost", steps=6, optim__lr=1e-2, **changes)
    with pytest.raises(RewardUnavailableError, match="gone"):
        entry.train(config, reward=Failing(kit.brightness, call))
    folder = Path(config.output_dir)
    done = (call - 1) // (2 if overlap else 1)
    assert [p.name for p in checkpoint.existing(folder / "checkpoints")] == [f"step_{done:06d}"]
    entry.train(config, reward=Failing(kit.brightness, None))
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    entry.train(whole, reward=Failing(kit.brightness, None))
    assert_equal_weights(folder, Path(whole.output_dir))
    assert_equal_logs(folder, Path(whole.output_dir))


def test_overlap_changes_no_score_and_no_parameter(kit, tmp_path):
    """Batches of 3 cut through the groups of 4, and the last one is short."""
    common = {"rollout__batch_size": 3, "rollout__guidance_scale": 2.0, "optim__lr": 1e-2}
    runs = {}
    for overlap in (False, True):
        config = kit.cheap(tmp_path / str(overlap), **common, rollout__overlap=overlap)
        counted = Failing(kit.brightness, None)
        counted.score = lambda media, prompts, context=None, c=counted: (
            setattr(c, "calls", c.calls + 1) or kit.brightness.score(media, prompts)
        )
        runs[overlap] = counted
        entry.train(config, reward=counted)
    assert (runs[False].calls, runs[True].calls) == (3, 9)
    assert_equal_weights(tmp_path / "False", tmp_path / "True")
    assert_equal_logs(tmp_path / "False", tmp_path / "True")


def test_overlap_that_cannot_be_is_refused(kit, tmp_path):
    config = kit.cheap(tmp_path, rollout__overlap=True)
    with pytest.raises(ConfigError, match=r"8 images of a step fit into one of 64; lower"):
        entry.build(config, tmp_path, kit.brightness)
    group = Failing(kit.brightness, None)
    group.info = replace(group.info, scope="group")
    torn = replace(config, rollout=replace(config.rollout, batch_size=6))
    with pytest.raises(
        ConfigError, match=r"batch_size \(6\) a multiple of images_per_prompt \(4\)"
    ):
        entry.build(torn, tmp_path, group)
    whole = replace(config, rollout=replace(config.rollout, batch_size=4))
    assert entry.build(whole, tmp_path, group)
    assert entry.run_preflight(whole, kit.brightness).ok  # on too few images to overlap


def test_all_processes_stop_where_one_lost_its_reward(kit, tmp_path, monkeypatch):
    trainer = entry.build(kit.cheap(tmp_path), tmp_path, kit.brightness)
    rollout, _ = trainer.rollouts.sample(0)
    lost = RewardUnavailableError("the server is gone")
    gathered = []

    def gather(objects):
        gathered.extend(objects)
        return [*objects, lost]

    monkeypatch.setattr("accelerate.utils.gather_object", gather)
    trainer.rollouts.accelerator = SimpleNamespace(num_processes=2, process_index=0)
    with pytest.raises(RewardFailedError, match="gone"):
        trainer.rollouts.score(rollout)
    trainer.rollouts.reward = Failing(kit.brightness, 1)
    with pytest.raises(RewardFailedError, match="gone"):
        trainer.rollouts.score(rollout)
    assert isinstance(gathered[0][0], Score) and isinstance(gathered[1], RewardUnavailableError)


def test_resuming_with_another_reward_is_said(kit, tmp_path, capfd):
    entry.train(kit.cheap(tmp_path, steps=1), reward=kit.brightness)
    other = Failing(kit.brightness, None)
    other.identity = "other@1"
    entry.train(kit.cheap(tmp_path, steps=2), reward=other)
    said = capfd.readouterr().err
    assert f"the reward is now other@1; the run began with {kit.brightness.identity}" in said
