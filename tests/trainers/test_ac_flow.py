"""AC-Flow: weights against a critic of noisy states, warm-up, ORW-CFM-W2 as a special case."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from mmalign.config import ConfigError
from mmalign.runtime.log import read_jsonl
from mmalign.sampling import generate
from trainers import checkpoint, entry
from trainers.ac_flow import AcFlow
from trainers.config import ForwardConfig, OptimConfig, RolloutConfig, TrainConfig
from trainers.loop import Trainer
from trainers.objective import build_objective
from vision_rewards.function import FunctionReward


def recipe(kit, folder, algorithm: str = "ac_flow", **changes) -> TrainConfig:
    """A cheap recipe of the forward process."""
    options = {"rollout__kernel": "ode", "forward__draws": 2, **changes}
    return replace(kit.cheap(folder, **options), algorithm=algorithm)


def build(kit, folder, algorithm: str = "ac_flow", **changes) -> Trainer:
    return entry.build(recipe(kit, folder, algorithm, **changes), folder, kit.brightness)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "tau"), [(5.0, 1.0), (1.0, 0.25)])
def test_weights_stay_within_the_exponential_of_the_clip(kit, tmp_path, clip, tau):
    """Even with rewards that stand far out from what the critic expects."""

    def heavy(media, prompts):
        values = torch.zeros(len(media))
        values[0], values[1] = 1e6, -1e6
        return values

    objective = {"temperature": tau, "critic": {"reward_clip": 50.0}}
    config = recipe(kit, tmp_path, advantage__clip=clip, objective=objective, images_per_prompt=64)
    reward = FunctionReward(heavy, takes="tensor")
    trainer = Trainer(config, kit.LinePolicy(), reward, Accelerator(cpu=True), tmp_path)
    rollout, _ = trainer.rollouts.sample(0)
    score, groups = trainer.rollouts.score(rollout)
    evidence, _ = trainer.evidence(rollout, score, groups)
    keep = torch.ones(128, dtype=torch.bool)
    got, _ = trainer.update.prepare(trainer.advantages(evidence), keep, groups, score.valid)
    assert got.shape == (128, 2)
    assert float(got.max()) == pytest.approx(math.exp(clip / tau), rel=1e-5)
    assert float(got.min()) == pytest.approx(math.exp(-clip / tau), rel=1e-5)


def test_unscored_samples_weigh_nothing():
    advantages = torch.tensor([[0.0, 1.0], [0.5, -1.0]])
    got = AcFlow(temperature=0.5).weights(advantages, torch.zeros(2), torch.tensor([False, True]))
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0], [math.e, math.exp(-2)]]))


def test_advantages_are_rewards_minus_values_at_each_draw(kit, tmp_path):
    trainer = build(kit, tmp_path, objective={"critic": {"lr": 1e-2}})
    trainer.train_step()
    rollout, _ = trainer.rollouts.sample(1)
    score, groups = trainer.rollouts.score(rollout)
    pooled = rollout.conditioning.positive["pooled"]
    with torch.no_grad():
        columns = []
        for k in range(2):
            sigma, noise = trainer.update.forward.draw(rollout, k)
            level = sigma[:, None, None, None]
            x = (1 - level) * rollout.final + level * noise
            columns.append(trainer.critic.net(x, sigma, pooled))
    evidence, _ = trainer.evidence(rollout, score, groups)
    wanted = (evidence.shaped[:, None] - torch.stack(columns, 1)).clamp(-5, 5)
    torch.testing.assert_close(trainer.advantages(evidence), wanted)
    assert torch.stack(columns).abs().max() > 0.01


def test_without_a_value_it_is_reward_weighted_matching(kit, tmp_path):
    """``V = 0``: the gradient is that of ORW-CFM-W2, whose weights are normalised in the group."""
    # Rewards in the same units: the critic's are divided by the deviation of all, as std: global.
    changes = {"prompts_per_step": 1, "images_per_prompt": 8}
    options = {"temperature": 0.7, "w2_beta": 0.0}
    plain = build(kit, tmp_path, "reward_weighted", objective=options, **changes)
    critic = build(kit, tmp_path, objective=options, **changes)
    rollout, _ = plain.rollouts.sample(0)
    score, groups = plain.rollouts.score(rollout)
    keep, found, sums = torch.ones(8, dtype=torch.bool), [], []
    for trainer in (plain, critic):
        evidence, _ = trainer.evidence(rollout, score, groups)  # the first look: V is still 0
        advantage = trainer.advantages(evidence)
        targets, _ = trainer.update.prepare(advantage, keep, groups, score.valid)
        trainer.update._accumulate(rollout, targets, keep, 8)
        found.append({n: p.grad for n, p in trainer.model.named_parameters()})
        sums.append(targets.reshape(8, -1)[:, 0].mean())
    assert sums[0] == pytest.approx(1.0) and sums[1] > 1.05
    scale = max(float(g.abs().max()) for g in found[1].values())
    for name, gradient in found[0].items():
        difference = found[1][name] - sums[1] * gradient
        assert float(difference.abs().max()) < 1e-5 * scale, name
    # The regulariser is the same function.
    batch, _ = critic.update.forward.batch(rollout, torch.ones(8), 0)
    batch = replace(batch, others={"reference": batch.velocity.detach() + 0.1})
    pair = [build_objective(n, {"w2_beta": 0.4}) for n in ("reward_weighted", "ac_flow")]
    assert pair[0].loss(batch)[0].equal(pair[1].loss(batch)[0])
    assert pair[1].needs == {"reference"} and AcFlow().needs == {"reference"}


# --- warm-up --------------------------------------------------------------------------------------


def test_only_the_critic_learns_during_warm_up(kit, tmp_path):
    changes = {"steps": 4, "optim__weight_decay": 0.1, "optim__lr": 1e-2}
    trainer = build(kit, tmp_path, objective={"warmup": 2, "w2_beta": 0.5}, **changes)
    before = weights(trainer)
    value = trainer.critic.net.value[-1].weight
    for step in range(2):
        held = value.detach().clone()
        metrics = trainer.train_step()
        assert all(v.equal(before[n]) for n, v in weights(trainer).items())
        assert not value.equal(held) and trainer.updates == 0
        assert metrics["nfe"] == 8 * 3 * (step + 1)  # rollouts alone
    metrics = trainer.train_step()
    assert trainer.updates == 1 and metrics["grad_norm"] > 0
    assert any(not v.equal(before[n]) for n, v in weights(trainer).items())
    with pytest.raises(ConfigError, match="warmup must not be negative"):
        build_objective("ac_flow", {"warmup": -1})


def test_resumed_run_is_the_one_never_stopped(kit, tmp_path):
    """Killed within the warm-up, the critic's state is all there is to keep."""
    changes = {"steps": 4, "save_every": 2, "keep_checkpoints": 9, "optim__lr": 1e-2,
               "objective": {"warmup": 3}}  # fmt: skip
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
    assert one["updates"] == two["updates"] == 1
    for name in ("model", "critic"):
        part = "weights" if name == "model" else "net"
        assert all(v.equal(two[name][part][n]) for n, v in one[name][part].items())


# --- learning -------------------------------------------------------------------------------------


def drawn_after(kit, folder, sign: float) -> torch.Tensor:
    """Where 200 seeds end after 40 steps towards 2, or away from it."""
    critic = {"lr": 3e-3, "updates": 5}
    config = TrainConfig(
        policy="line", algorithm="ac_flow", steps=45, prompts_per_step=4, images_per_prompt=8,
        save_every=1000, objective={"temperature": 0.5, "w2_beta": 0.0, "critic": critic},
        model=kit.cheap(folder).model,
        rollout=RolloutConfig(steps=4, guidance_scale=1.0, kernel="ode"),
        forward=ForwardConfig(levels=(0.3, 1.0)),
        optim=OptimConfig(lr=0.05, weight_decay=0.0),
    )  # fmt: skip

    def near_two(media, prompts):
        return -sign * (media.flatten(1).mean(1) - 2).square()

    policy = kit.LinePolicy()
    reward = FunctionReward(near_two, takes="tensor")
    Trainer(config, policy, reward, Accelerator(cpu=True), folder).run()
    media, _ = generate(policy, ["x"] * 200, list(range(200)), steps=4, guidance_scale=1.0)
    return -(media.data.flatten() - 2).square()


def test_reward_rises_on_a_bandit_and_falls_with_its_sign_flipped(kit, tmp_path):
    media, _ = generate(
        kit.LinePolicy(), ["x"] * 200, list(range(200)), steps=4, guidance_scale=1.0
    )
    before = float(-(media.data.flatten() - 2).square().mean())
    assert float(drawn_after(kit, tmp_path / "up", 1.0).mean()) > before + 1.0
    assert float(drawn_after(kit, tmp_path / "down", -1.0).mean()) < before - 1.0
    log = read_jsonl(tmp_path / "up" / "metrics.jsonl")
    assert [r["grad_norm"] == 0 for r in log] == [True] * 5 + [False] * 40
