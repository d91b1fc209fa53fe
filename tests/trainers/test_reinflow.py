"""ReinFlow: noise learned with the policy, by one log-probability, in one training state."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from mmalign.config import ConfigError
from mmalign.policies.load import load_policy
from mmalign.runtime.log import read_jsonl
from mmalign.sampling import generate, replay
from trainers import checkpoint, entry
from trainers.config import OptimConfig, RolloutConfig, TrainConfig
from trainers.loop import Trainer
from trainers.objective import build_objective
from trainers.preflight import preflight, small
from vision_rewards.function import FunctionReward

ADVANTAGE = torch.tensor([1.0, -1, 0.5, -0.5, 2, -2, 0, 0.3])
BOUNDS = {"std_min": 0.05, "std_max": 0.5}


def learned(kit, folder, **changes) -> TrainConfig:
    """A cheap recipe with learned noise."""
    options = {"rollout__kernel": "learned", "rollout__kernel_options": dict(BOUNDS), **changes}
    return replace(kit.cheap(folder, **options), algorithm="reinflow")


def build(kit, folder, **changes) -> Trainer:
    return entry.build(learned(kit, folder, **changes), folder, kit.brightness)


def noise_of(trainer) -> torch.Tensor:
    """The parameters of the noise."""
    return trainer.rollouts.kernel.phi


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy_beta", [0.0, 0.2])
def test_gradient_of_the_noise(kit, tmp_path, entropy_beta):
    """``d L / d phi_k = -(mean of A (z^2 - 1) + beta_H) / s ds/dphi / S``."""
    config = learned(kit, tmp_path, objective={"entropy_beta": entropy_beta}, rollout__steps=4)
    trainer = Trainer(config, kit.LinePolicy(), kit.brightness, Accelerator(cpu=True), tmp_path)
    rollout, _ = trainer.rollouts.sample(0)
    trainer.update._accumulate(rollout, ADVANTAGE, torch.ones(8, dtype=torch.bool), 8)
    kernel = trainer.rollouts.kernel
    s = kernel.stds.detach()[0]
    slope = 0.5 * math.log(10) * (1 - torch.tanh(kernel.phi.detach()[0]).square()) * s
    for index in range(3):
        step, _ = replay(trainer.policy, rollout, index, kernel)
        z = ((rollout.next_latents[:, index] - step.mean) / s).flatten().detach()
        mean = (ADVANTAGE * (z.square() - 1)).mean() + entropy_beta
        torch.testing.assert_close(kernel.phi.grad[index], -mean / s * slope / 3)
    assert kernel.phi.grad.abs().max() > 1e-3


def test_velocity_gets_the_gradient_of_flow_grpo(kit, tmp_path):
    """The entropy says nothing about the network."""
    found = []
    for beta in (0.0, 0.5):
        trainer = build(kit, tmp_path, objective={"entropy_beta": beta}, rollout__steps=3)
        rollout, _ = trainer.rollouts.sample(0)
        trainer.update._accumulate(rollout, ADVANTAGE, torch.ones(8, dtype=torch.bool), 8)
        found.append([p.grad for _, p in trainer.model._own_parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


def test_ratio_starts_at_one_under_moved_noise(kit, tmp_path):
    trainer = build(kit, tmp_path, steps=3, objective={"noise_lr": 0.3, "kl_beta": 0.1})
    before = noise_of(trainer).detach().clone()
    first, second = trainer.train_step(), trainer.train_step()
    # In fp32 some processors round the same sum otherwise with a gradient than without.
    assert max(r["ratio/max_deviation"] for r in (first, second)) < 1e-6
    assert first["kl"] < 1e-12 < second["kl"]  # between equal noise: it is the velocity's alone
    assert (noise_of(trainer) - before).abs().min() > 0.1
    assert trainer.update.kernel is trainer.rollouts.kernel


def test_second_update_is_measured_by_the_noise_that_sampled(kit, tmp_path):
    changes = {"optim__updates_per_rollout": 2, "optim__lr": 1e-9, "objective": {"noise_lr": 0.1}}
    metrics = build(kit, tmp_path, **changes).train_step()
    assert metrics["ratio/max_deviation"] > 1e-4  # the network has hardly moved, the noise has


# --- one state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_noise_has_a_rate_of_its_own_and_no_decay(kit, tmp_path, optimizer):
    changes = {"optim__name": optimizer, "optim__lr": 0.0, "optim__weight_decay": 0.5}
    trainer = build(kit, tmp_path, objective={"noise_lr": 0.01, "entropy_beta": 5.0}, **changes)
    own = [p.detach().clone() for _, p in trainer.model._own_parameters()]
    before = noise_of(trainer).detach().clone()
    trainer.train_step()
    # Adam's first step is its rate, whatever the gradient; the entropy wants more noise.
    torch.testing.assert_close(noise_of(trainer) - before, torch.full((2, 1), 0.01))
    assert all(a.equal(b) for a, (_, b) in zip(own, trainer.model._own_parameters(), strict=True))


def test_resumed_run_is_the_one_never_stopped(kit, tmp_path):
    changes = {"steps": 4, "save_every": 2, "keep_checkpoints": 9, "optim__lr": 1e-2,
               "optim__updates_per_rollout": 2, "model__ema_decay": 0.5,
               "rollout__kernel_options": {**BOUNDS, "per_channel": True}}  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    build(kit, whole, **changes).run()
    shutil.copytree(whole / "checkpoints/step_000002", cut / "checkpoints/step_000002")
    again = build(kit, cut, **changes)
    assert again.resume() and again.step == 2
    again.run()
    one, two = (
        torch.load(f / "checkpoints/step_000004" / checkpoint.FILE, weights_only=True)
        for f in (whole, cut)
    )
    weights = one["model"]["weights"]
    assert weights["kernel.noise"].shape == (2, 4) and weights["kernel.noise"].std() > 0
    for part in ("weights", "ema"):
        assert all(v.equal(two["model"][part][n]) for n, v in one["model"][part].items())
    states = one["optimizer"]["state"], two["optimizer"]["state"]
    assert all(v["exp_avg"].equal(states[1][n]["exp_avg"]) for n, v in states[0].items())


def test_evaluation_is_deterministic_and_the_noise_is_not_exported(kit, tmp_path):
    drawn = {}

    def evaluate(policy, config, folder, label):
        drawn[label] = generate(policy, ["a red star"], [3], steps=3, guidance_scale=1.0)[0].data

    config = learned(kit, tmp_path, optim__lr=1e-2)
    folder = entry.train(config, reward=kit.brightness, evaluate=evaluate)
    exported = load_file(folder / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert exported and not any("kernel" in name or "noise" in name for name in exported)
    policy = load_policy(folder / "pipeline")
    again = generate(policy, ["a red star"], [3], steps=3, guidance_scale=1.0)[0].data
    torch.testing.assert_close(again, drawn["after"], rtol=1e-4, atol=1e-5)


def test_preflight_reaches_the_noise_too(kit, tmp_path):
    config = small(learned(kit, tmp_path))
    trainer = entry.build(config, tmp_path, kit.brightness)
    report = preflight(trainer)
    assert report.ok, report.failures
    details = {c.name: c.detail for c in report.checks}
    count = len(trainer.model.named_parameters())
    assert f"{count} trainable tensors" in details["gradient reaches every parameter"]
    assert trainer.model.named_parameters()[-1][0] == "kernel.noise"


def test_kernel_and_objective_must_agree(kit, tmp_path):
    with pytest.raises(ConfigError, match="use algorithm reinflow"):
        entry.build(
            replace(learned(kit, tmp_path), algorithm="flow_grpo"), tmp_path, kit.brightness
        )
    with pytest.raises(ConfigError, match=r"use rollout\.kernel learned"):
        build(kit, tmp_path, rollout__kernel="flow_sde", rollout__kernel_options={})
    for name, value in (("entropy_beta", -1.0), ("noise_lr", 0.0)):
        with pytest.raises(ConfigError, match=name):
            build_objective("reinflow", {name: value})


# --- learning -------------------------------------------------------------------------------------


def bandit(kit, folder, sign: float = 1.0, **objective) -> tuple[list[float], torch.Tensor]:
    """Rewards of 60 steps towards 2 (or away from it), and the deviations at the end."""
    config = TrainConfig(
        policy="line", algorithm="reinflow", steps=60, prompts_per_step=4, images_per_prompt=8,
        save_every=1000, objective={"clip_range": 0.2, "noise_lr": 0.05, **objective},
        model=kit.cheap(folder).model,
        rollout=RolloutConfig(
            steps=4, guidance_scale=1.0, kernel="learned", kernel_options=dict(BOUNDS)
        ),
        optim=OptimConfig(lr=0.05),
    )  # fmt: skip

    def near_two(media, prompts):
        return -sign * (media.flatten(1).mean(1) - 2).square()

    reward = FunctionReward(near_two, takes="tensor")
    trainer = Trainer(config, kit.LinePolicy(), reward, Accelerator(cpu=True), folder)
    trainer.run()
    log = read_jsonl(folder / "metrics.jsonl")
    return [sign * r["reward/mean"] for r in log], trainer.rollouts.kernel.stds.detach()


def test_reward_rises_on_a_bandit_and_falls_with_its_sign_flipped(kit, tmp_path):
    up, _ = bandit(kit, tmp_path / "up")
    assert sum(up[-5:]) / 5 > sum(up[:5]) / 5 + 1.5
    down, _ = bandit(kit, tmp_path / "down", -1.0)
    assert sum(down[-5:]) / 5 < sum(down[:5]) / 5 - 1.5
    assert up[0] == pytest.approx(down[0])


def test_entropy_keeps_the_noise_from_collapsing(kit, tmp_path):
    start = math.sqrt(0.05 * 0.5)
    _, without = bandit(kit, tmp_path / "without", entropy_beta=0.0, noise_lr=0.2)
    up, kept = bandit(kit, tmp_path / "kept", entropy_beta=0.1, noise_lr=0.2)
    assert without.mean() < 0.6 * start and (without >= 0.05).all()  # and not below the floor
    assert kept.min() > start
    assert sum(up[-5:]) / 5 > sum(up[:5]) / 5 + 1.0  # and it learns all the same
