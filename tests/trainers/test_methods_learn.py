"""Every policy-gradient method, and group compositions as rewards, on a bandit of one number."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from mmalign.runtime.log import read_jsonl
from mmalign.sampling import generate
from trainers.config import AdvantageConfig, OptimConfig, RolloutConfig, TrainConfig
from trainers.loop import Trainer
from vision_rewards.compose import build
from vision_rewards.function import FunctionReward
from vision_rewards.guard import GuardedReward

METHODS = {
    "dense_grpo": {"clip_range": 0.2},
    "one_step": {"clip_range": 0.2, "completion_steps": 1},
    "turning_point_grpo": {"clip_range": 0.2},
    "vgpo": {"clip_range": 0.2},
    "grpo_guard": {"clip_range": 0.2},
    "flow_dppo": {"divergence": 0.05},
    "mix_grpo": {"clip_range": 0.2},
}
ALGORITHMS = {"one_step": "dense_grpo"} | dict.fromkeys(
    ("mix_grpo", "pref_grpo", "parrot"), "flow_grpo"
)


PARROT = AdvantageConfig(std="group", combine="advantages", select="pareto")


def bell(media, prompts):
    """1 at 2, falling to both sides; never negative."""
    return 1 / (1 + (media.flatten(1).mean(1) - 2).square())


def dip(media, prompts):
    """The opposite."""
    return 1 - bell(media, prompts)


def recipe(kit, folder, method: str) -> TrainConfig:
    """40 steps of 4 prompts x 8 images on a grid of 4."""
    window = {"train": "window", "window": 1, "window_start": (0, 2), "window_every": 4}
    sliding = {**window, "window_strategy": "progressive"} if method == "mix_grpo" else {}
    return TrainConfig(
        policy="line",
        algorithm=ALGORITHMS.get(method, method),
        objective=METHODS.get(method, {"clip_range": 0.2}),
        steps=40,
        prompts_per_step=4,
        images_per_prompt=8,
        save_every=1000,
        model=kit.cheap(folder).model,
        rollout=RolloutConfig(steps=4, guidance_scale=1.0, **sliding),
        advantage=PARROT if method == "parrot" else AdvantageConfig(),
        optim=OptimConfig(lr=0.05, updates_per_rollout=2 if method == "flow_dppo" else 1),
    )


def drawn(policy) -> torch.Tensor:
    """Where the policy ends, for 200 seeds."""
    media, _ = generate(policy, ["x"] * 200, list(range(200)), steps=4, guidance_scale=1.0)
    return media.data.flatten()


def trained(kit, folder, method: str, reward) -> tuple[torch.Tensor, torch.Tensor]:
    """What the policy draws before and after training."""
    policy = kit.LinePolicy()
    before = drawn(policy)
    config = recipe(kit, folder, method)
    Trainer(config, policy, GuardedReward(reward), Accelerator(cpu=True), folder).run()
    return before, drawn(policy)


def mean_bell(values: torch.Tensor) -> float:
    """Mean of the bell over drawn numbers."""
    return float(bell(values[:, None], ()).mean())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_reward_rises_and_falls_with_its_sign(kit, tmp_path, method):
    up = FunctionReward(bell, takes="tensor", range=(0.0, 1.0))
    before, after = trained(kit, tmp_path / "up", method, up)
    assert mean_bell(after) > mean_bell(before) + 0.25
    down = FunctionReward(dip, takes="tensor", range=(0.0, 1.0))
    _, after = trained(kit, tmp_path / "down", method, down)
    assert mean_bell(after) < mean_bell(before) - 0.03
    log = read_jsonl(tmp_path / "up" / "metrics.jsonl")
    assert len(log) == 40 and all(r["grad_norm"] > 0 for r in log[:10])


# --- Pref-GRPO and Parrot: compositions under Flow-GRPO -------------------------------------------


def test_win_rates_train(kit, tmp_path):
    """The mean win rate is 1/2 by construction, so it is the wins' cause that must rise."""
    judge = FunctionReward(bell, takes="tensor")
    reward = build("win_rate", {"judge": (judge, 1.0)}, {})
    before, after = trained(kit, tmp_path, "pref_grpo", reward)
    assert mean_bell(after) > mean_bell(before) + 0.25
    log = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["reward/mean"] for r in log] == pytest.approx([0.5] * 40)


def test_win_rates_do_not_see_the_scale_of_a_reward(kit, tmp_path):
    """Any rising function of the judge's score makes the same run, bit for bit."""

    def steep(media, prompts):
        return (20 * bell(media, prompts)).exp()

    found = []
    for name, function in (("plain", bell), ("steep", steep)):
        judge = FunctionReward(function, takes="tensor")
        reward = build("win_rate", {"judge": (judge, 1.0)}, {})
        found.append(trained(kit, tmp_path / name, "pref_grpo", reward)[1])
    assert found[0].equal(found[1])


def test_pareto_selection_moves_towards_both_rewards(kit, tmp_path):
    """Two bells side by side: between them lie the samples that nothing dominates."""

    def left(media, prompts):
        return -(media.flatten(1).mean(1) - 1.5).abs()

    def right(media, prompts):
        return -(media.flatten(1).mean(1) - 2.5).abs()

    parts = {n: (FunctionReward(f, takes="tensor"), 1.0) for n, f in (("a", left), ("b", right))}
    reward = build("weighted_sum", parts, {})
    before, after = trained(kit, tmp_path, "parrot", reward)
    inside = [float(((v > 1.5) & (v < 2.5)).float().mean()) for v in (before, after)]
    assert inside[0] < 0.15 and inside[1] > inside[0] + 0.3
