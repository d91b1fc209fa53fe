"""Flow-GRPO's mathematics, and that it climbs where climbing can be watched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.distributions import Normal, kl_divergence

from mmalign.config import ConfigError
from mmalign.protocols import Policy
from mmalign.runtime.log import read_jsonl
from mmalign.sampling import Plan, build_kernel, collect, replay
from mmalign.types import Step
from trainers.config import OptimConfig, RolloutConfig, TrainConfig
from trainers.flow_grpo import FlowGrpo
from trainers.loop import Trainer
from trainers.objective import StepBatch, build_objective
from vision_rewards.function import FunctionReward


def batch(**changes) -> StepBatch:
    """Four samples of eight latents, current and reference transitions of the same deviation."""
    torch.manual_seed(3)
    shape = (4, 2, 2, 2)
    mean, other, std = torch.randn(shape), torch.randn(shape), torch.tensor(0.37)
    zero = torch.zeros(4)
    values = {
        "log_prob": zero,
        "old_log_prob": zero,
        "advantage": torch.ones(4),
        "step": Step(mean, mean, std, zero, mean),
        "velocity": torch.randn(shape),
        "reference": Step(other, other, std, zero, other),
        "reference_velocity": torch.randn(shape),
        "h": torch.tensor(0.2),
    }
    return StepBatch(**{**values, **changes})


# --- the policy gradient --------------------------------------------------------------------------


def test_gradient_at_ratio_one_is_minus_advantage_times_score(kit):
    policy = kit.LinePolicy(slope=0.7, shift=0.2)
    kernel = build_kernel("flow_sde", noise_level=0.7, sigma_max=0.9)
    plan = Plan(kernel=kernel, steps=2, guidance_scale=1.0, record=(0,))
    rollout = collect(policy, ["x"] * 5, torch.zeros(5), [1, 2, 3, 4, 5], plan)
    advantage = torch.tensor([1.5, -2.0, 0.3, 0.0, -0.1])
    step, velocity = replay(policy, rollout, 0, kernel)
    seen = batch(
        log_prob=step.log_prob,
        old_log_prob=rollout.log_probs[:, 0],
        advantage=advantage,
        step=step,
        velocity=velocity,
    )
    loss, metrics = FlowGrpo().loss(seen)
    parameters = list(policy.denoiser.parameters())
    got = torch.autograd.grad(loss.sum(), parameters, retain_graph=True)
    wanted = torch.autograd.grad(-(advantage * step.log_prob).sum(), parameters)
    torch.testing.assert_close(got, wanted)
    assert metrics["ratio"].equal(torch.ones(5)) and not metrics["clip"].any()
    # By hand: log p = -(x' - mean)^2 / 2 s^2 and d mean / d shift = -h at sigma = 1.
    x, x_next = rollout.latents.flatten(), rollout.next_latents.flatten()
    g, h = 0.7 * (1 / (1 - 0.9)) ** 0.5, 0.5
    mean = x - h * ((0.7 * x + 0.2) + g**2 / 2 * x)
    by_hand = -(advantage * (x_next - mean) / (g**2 * h) * -h).sum()
    torch.testing.assert_close(got[1], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("high", [None, 0.3])
def test_clipping_stops_only_moves_that_already_went_far_enough(high):
    objective = FlowGrpo(clip_range=0.1, clip_range_high=high)
    ratios = torch.tensor([0.5, 0.85, 0.95, 1.0, 1.05, 1.25, 1.5])
    top = 1.1 if high is None else 1.3
    for sign in (1.0, -1.0):
        log_prob = ratios.log().requires_grad_()
        seen = batch(
            log_prob=log_prob, old_log_prob=torch.zeros(7), advantage=torch.full((7,), sign)
        )
        loss, metrics = objective.loss(seen)
        (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
        stopped = ratios > top if sign > 0 else ratios < 0.9
        assert (gradient == 0).equal(stopped)
        torch.testing.assert_close(gradient[~stopped], -sign * ratios[~stopped])
        assert metrics["clip"].bool().equal(stopped)


# --- the KL ---------------------------------------------------------------------------------------


def test_exact_kl_is_that_of_the_two_gaussians_over_d():
    b = batch()
    pair = Normal(b.step.mean, b.step.std), Normal(b.reference.mean, b.reference.std)
    wanted = kl_divergence(*pair).flatten(1).mean(1)
    torch.testing.assert_close(FlowGrpo(kl_beta=1.0).kl(b), wanted)


def test_other_forms_of_the_kl():
    b = batch()
    forms = {f: FlowGrpo(kl_form=f).kl(b) for f in ("exact", "no_dt", "velocity", "state")}
    torch.testing.assert_close(forms["no_dt"], forms["exact"] * b.h)
    difference = (b.velocity - b.reference_velocity).square().flatten(1).mean(1)
    torch.testing.assert_close(forms["velocity"], difference)
    torch.testing.assert_close(forms["state"], forms["exact"] * 2 * 0.37**2)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_exact_kl_in_terms_of_velocities(name):
    """``KL = h/2 (1/g + g (1 - sigma) / (2 sigma))^2 |v - v_ref|^2`` for both SDE kernels."""
    torch.manual_seed(0)
    x, v, w = torch.randn(3, 4, 2, 2, 2).unbind(0)
    sigma, after = torch.tensor(0.6), torch.tensor(0.4)
    kernel = build_kernel(name)
    current, reference = (kernel.step(x, sigma, after, p, noise=x) for p in (v, w))
    b = batch(step=current, reference=reference, velocity=v, reference_velocity=w, h=sigma - after)
    g = 0.3 if name == "dance_sde" else 0.7 * (0.6 / 0.4) ** 0.5
    factor = 0.2 / 2 * (1 / g + g * 0.4 / 1.2) ** 2
    velocity = FlowGrpo(kl_form="velocity").kl(b)
    torch.testing.assert_close(FlowGrpo().kl(b), factor * velocity)


def test_kl_pulls_the_current_transition_only():
    b = batch()
    mean = b.step.mean.clone().requires_grad_()
    loss, metrics = FlowGrpo(kl_beta=0.5).loss(replace(b, step=replace(b.step, mean=mean)))
    (gradient,) = torch.autograd.grad(loss.sum(), mean)
    torch.testing.assert_close(gradient, 0.5 * (mean - b.reference.mean) / (8 * 0.37**2))
    torch.testing.assert_close(loss, -torch.ones(4) + 0.5 * metrics["kl"])


def test_the_reference_is_asked_for_only_where_it_is_used():
    assert FlowGrpo(kl_beta=0.01).needs == {"reference"}
    assert FlowGrpo().needs == frozenset()
    loss, metrics = FlowGrpo().loss(batch(reference=None, reference_velocity=None))
    assert len(loss) == 4 and "kl" not in metrics


@pytest.mark.parametrize("options", [{"clip_range": 0.0}, {"clip_range": -1.0}, {"kl_beta": -0.1}])
def test_impossible_options_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"objective: {name} must"):
        build_objective("flow_grpo", options)


# --- the bandit -----------------------------------------------------------------------------------


def rewards_of_a_run(kit, folder, sign: float, kernel: str) -> list[float]:
    config = TrainConfig(
        policy="line",
        steps=40,
        prompts_per_step=4,
        images_per_prompt=8,
        save_every=1000,
        objective={"clip_range": 0.2},
        model=kit.cheap(folder).model,
        rollout=RolloutConfig(steps=4, guidance_scale=1.0, kernel=kernel),
        optim=OptimConfig(lr=0.05),
    )

    def near_two(media, prompts):
        return -sign * (media.flatten(1).mean(1) - 2).square()

    policy = kit.LinePolicy()
    assert isinstance(policy, Policy) and not hasattr(policy, "pipeline")
    reward = FunctionReward(near_two, takes="tensor")
    Trainer(config, policy, reward, Accelerator(cpu=True), folder).run()
    return [sign * r["reward/mean"] for r in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps"])
def test_reward_rises_on_a_bandit_and_falls_with_its_sign_flipped(kit, tmp_path, kernel):
    up = rewards_of_a_run(kit, tmp_path / "up", 1.0, kernel)
    assert sum(up[-5:]) / 5 > sum(up[:5]) / 5 + 1.5
    down = rewards_of_a_run(kit, tmp_path / "down", -1.0, kernel)
    assert sum(down[-5:]) / 5 < sum(down[:5]) / 5 - 1.5
    assert up[0] == pytest.approx(down[0])  # both start from the same samples
