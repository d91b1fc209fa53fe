"""The few-step generator: chords of the teacher's path, resuming, its sampler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmalign.policies.load import load_policy
from mmalign.sampling import generate
from mmalign.sampling.generate import autocast, integrate
from mmalign.shapes import parse, split_of
from trainers.pretrain import distill as module
from trainers.pretrain.distill import DistillConfig, PathPool, chord_loss, distill, shard_captions

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def config(folder: Path, **options: object) -> DistillConfig:
    settings = {"shards": 2, "shard_size": 4, "steps": 4, "batch_size": 6, "save_every": 2}
    settings |= {"teacher_steps": 4, "windows": 2}
    return DistillConfig(out=str(folder), **{**settings, **options})


def test_chords_cross_the_windows_of_the_guided_path(tmp_path: Path) -> None:
    settings, teacher = config(tmp_path), load_policy("shapes-flow")
    pool = PathPool(settings, teacher)
    pool.grow_for(0)
    captions = shard_captions(settings, 0)
    assert {split_of(parse(c)) for c in captions} == {"train"}
    path = pool.states[0].float()
    assert path.shape[:2] == (4, 3)
    with autocast(teacher.device, torch.bfloat16):
        ends = integrate(teacher, path[:, 0], torch.linspace(1, 0, 5), pool.given[0], 2.0)
    # Paths are kept in fp16; the network runs in bf16.
    assert float((path[:, -1] - ends).abs().mean()) < 0.02 < float(ends.abs().mean())
    start, sigma, chord, given = pool.batch(0)
    assert len(given) == 6 and set(sigma.tolist()) <= {1.0, 0.5}
    # One step of the window's length takes the start to a state of some path.
    for state in start - 0.5 * chord:
        assert min(float((state - row).abs().max()) for row in path[:, 1:].flatten(0, 1)) < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(pool.batch(3)[:3], pool.batch(3)[:3], strict=True))


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distill(config(tmp_path / "whole"))

    def interrupted(student, pool, step):
        if step == 3:
            raise KeyboardInterrupt
        return chord_loss(student, pool, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "chord_loss", interrupted)
        distill(config(tmp_path / "parts"))
    parts = distill(config(tmp_path / "parts"))
    a, b, shipped = (load_file(folder / WEIGHTS) for folder in (whole, parts, _shipped()))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], shipped[name]) for name in a)
    policy = load_policy(str(whole))
    assert (policy.sampler.steps, policy.sampler.guidance_scale) == (2, 1.0)
    torch.testing.assert_close(policy.sigmas(2), torch.tensor([1.0, 0.5, 0.0]))
    _, nfe = generate(policy, ["a photo of a red star"], [1])
    assert nfe == 2
    with pytest.raises(ValueError, match="no grid of 1 step"):
        policy.sigmas(1)


def _shipped() -> Path:
    from mmalign.assets import asset

    return asset("shapes-flow")


def test_windows_must_divide_the_teachers_steps() -> None:
    with pytest.raises(ValueError, match="windows"):
        DistillConfig(windows=3, teacher_steps=8)
    with pytest.raises(ValueError, match="windows"):
        DistillConfig(windows=0)


def test_one_window_makes_a_generator_of_one_step_from_one_of_more(tmp_path: Path) -> None:
    few = config(tmp_path / "few", steps=1)
    distill(few)
    settings = config(tmp_path / "one", windows=1, student=str(tmp_path / "few/pipeline"))
    pool = PathPool(settings, load_policy("shapes-flow"))
    pool.grow_for(0)
    start, sigma, chord, _ = pool.batch(0)
    assert sigma.tolist() == [1.0] * 6
    ends = pool.states[0][:, -1].float()
    for picture in start - chord:
        assert min(float((picture - end).abs().max()) for end in ends) < 1e-4
    policy = load_policy(str(distill(settings)))
    assert policy.sampler.steps == 1 and policy.sigmas(1).tolist() == [1.0, 0.0]
    _, nfe = generate(policy, ["a photo of a red star"], [1])
    assert nfe == 1
