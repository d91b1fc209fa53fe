"""GRPO-Guard and Flow-DPPO: what a policy that has moved looks like to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from mmalign.config import ConfigError
from mmalign.sampling import Plan, build_kernel, collect, replay
from mmalign.types import Rollout
from trainers import entry
from trainers.flow_dppo import FlowDppo
from trainers.flow_grpo import FlowGrpo
from trainers.grpo_guard import GrpoGuard, normalised_log_ratio
from trainers.objective import StepBatch, build_objective

STEPS = 6


def moved(kit, kernel_name: str, samples: int = 400, shift: float = 0.25):
    """Batches of every recorded step of a rollout, under a policy that has moved since."""
    policy = kit.LinePolicy(slope=0.4, shift=0.1)
    kernel = build_kernel(kernel_name)
    plan = Plan(
        kernel=kernel, steps=STEPS, guidance_scale=1.0, record=tuple(range(STEPS - 1)),
        keep_means=True,
    )  # fmt: skip
    rollout = collect(policy, ["x"] * samples, torch.zeros(samples), list(range(samples)), plan)
    policy.denoiser.shift.data += shift
    return rollout, [seen(policy, rollout, index, kernel) for index in range(STEPS - 1)]


def seen(policy, rollout: Rollout, index: int, kernel) -> StepBatch:
    """What an objective sees of one recorded step."""
    step, velocity = replay(policy, rollout, index, kernel)
    k = rollout.steps[index]
    return StepBatch(
        log_prob=step.log_prob,
        old_log_prob=rollout.log_probs[:, index],
        advantage=torch.ones(len(rollout)),
        step=step,
        velocity=velocity,
        reference=None,
        reference_velocity=None,
        h=rollout.sigmas[k] - rollout.sigmas[k + 1],
        old_mean=rollout.means[:, index],
    )


# --- GRPO-Guard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps"])
def test_normalised_log_ratio_is_noise_times_movement(kit, kernel):
    """``<z, mean - mean_old>``, whatever the kernel: the deviation cancels."""
    rollout, batches = moved(kit, kernel)
    for index, b in enumerate(batches):
        z = (rollout.next_latents[:, index] - rollout.means[:, index]) / b.step.std
        wanted = (z * (b.step.mean - b.old_mean)).flatten(1).mean(1)
        torch.testing.assert_close(normalised_log_ratio(b), wanted, rtol=2e-3, atol=2e-5)


def test_ratios_of_a_recorded_rollout_are_equalised(kit):
    """Mean 0 at every step, and a deviation that no longer depends on the step's noise."""
    _, batches = moved(kit, "flow_sde")
    plain = [(b.log_prob - b.old_log_prob).detach() for b in batches]
    guard = [normalised_log_ratio(b).detach() for b in batches]
    for b, before, after in zip(batches, plain, guard, strict=True):
        movement = (b.step.mean - b.old_mean).square().mean().sqrt().item()
        std = b.step.std.item()
        error = movement / len(before) ** 0.5  # of the mean of a sample
        assert before.mean().item() == pytest.approx(
            -(movement**2) / (2 * std**2), abs=4 * error / std
        )
        assert after.mean().item() == pytest.approx(0.0, abs=4 * error)
        assert after.std().item() == pytest.approx(movement, rel=0.15)
        assert before.std().item() == pytest.approx(movement / std, rel=0.15)
    # By the unit of movement the deviation is now 1 at every step; before it was 1 / s.
    units = [(b.step.mean - b.old_mean).square().mean().sqrt() for b in batches]
    spread = [torch.stack([r.std() / u for r, u in zip(rs, units, strict=True)])
              for rs in (plain, guard)]  # fmt: skip
    assert spread[0].max() / spread[0].min() > 2
    assert spread[1].max() / spread[1].min() < 1.2


def test_gradient_of_every_step_weighs_the_same_per_unit_of_length(kit):
    """At ratio 1 ``-A z d mean / d shift / h``, where ``d mean / d shift = -h * factor``."""
    rollout, _ = moved(kit, "dance_sde", samples=5, shift=0.0)
    policy = kit.LinePolicy(slope=0.4, shift=0.1)
    kernel = build_kernel("dance_sde")
    for index in range(STEPS - 1):
        b = seen(policy, rollout, index, kernel)
        loss, metrics = GrpoGuard().loss(b)
        (got,) = torch.autograd.grad(loss.sum(), policy.denoiser.shift)
        sigma = rollout.sigmas[index]
        factor = 1 + 0.3**2 * (1 - sigma) / (2 * sigma)
        z = (rollout.next_latents[:, index] - rollout.means[:, index]) / b.step.std
        torch.testing.assert_close(got, (z * factor).sum(), rtol=1e-3, atol=1e-4)
        assert metrics["ratio"].equal(torch.ones(5))
        plain, _ = GrpoGuard(reweight=False).loss(seen(policy, rollout, index, kernel))
        torch.testing.assert_close(loss, plain / b.h)


def test_the_clip_acts_on_the_normalised_ratio(kit):
    _, batches = moved(kit, "flow_sde", samples=50)
    for b in batches:
        ratio = normalised_log_ratio(b).detach().exp()
        _, metrics = GrpoGuard(clip_range=0.01).loss(b)
        torch.testing.assert_close(metrics["ratio"], ratio)
        assert metrics["clip"].bool().equal(ratio > 1.01)
        flipped = replace(b, advantage=-b.advantage)
        assert GrpoGuard(clip_range=0.01).loss(flipped)[1]["clip"].bool().equal(ratio < 0.99)


# --- Flow-DPPO ------------------------------------------------------------------------------------


def test_divergence_is_the_kl_of_the_two_transitions(kit):
    _, batches = moved(kit, "flow_sde", samples=8)
    for b in batches:
        _, metrics = FlowDppo().loss(b)
        pair = Normal(b.old_mean, b.step.std), Normal(b.step.mean, b.step.std)
        torch.testing.assert_close(metrics["divergence"], kl_divergence(*pair).flatten(1).mean(1))


def test_only_samples_far_away_that_go_further_are_left_out(kit):
    _, batches = moved(kit, "flow_sde", samples=40)
    b = batches[2]
    ratio = (b.log_prob - b.old_log_prob).detach().exp()
    assert 5 < int((ratio > 1).sum()) < 35
    for sign in (1.0, -1.0):
        given = replace(b, advantage=torch.full((40,), sign))
        stopped = ratio > 1 if sign > 0 else ratio < 1
        loss, metrics = FlowDppo(divergence=1e-6).loss(given)
        assert metrics["clip"].bool().equal(stopped)
        assert not loss[stopped].any()
        torch.testing.assert_close(loss[~stopped], -sign * ratio[~stopped])
        (gradient,) = torch.autograd.grad(loss.sum(), b.log_prob, retain_graph=True)
        assert (gradient == 0).equal(stopped)
        free, metrics = FlowDppo(divergence=1e3).loss(given)
        assert not metrics["clip"].any()
        torch.testing.assert_close(free, -sign * ratio)


# --- both in the loop -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo_guard", "flow_dppo"])
def test_first_ratio_is_one_and_later_ones_are_not(kit, tmp_path, name):
    """On a stock pipeline with guidance: stored means are those of the replay, bit for bit."""
    config = kit.cheap(
        tmp_path, algorithm=name, rollout__guidance_scale=2.0, optim__lr=3e-3,
        objective={"kl_beta": 0.01}, rollout__batch_size=3, optim__updates_per_rollout=2,
    )  # fmt: skip
    trainer = entry.build(config, tmp_path, kit.brightness)
    rollout, _ = trainer.rollouts.sample(0)
    assert rollout.means.shape == rollout.latents.shape
    for index in range(len(rollout.steps)):
        step, _ = replay(trainer.policy, rollout, index, trainer.rollouts.kernel)
        assert (step.mean - rollout.means[:, index]).abs().max() < 1e-5
    metrics = trainer.train_step()
    assert metrics["ratio/max_deviation"] > 0 and metrics["kl"] >= 0  # of the second update
    one = entry.build(
        replace(config, optim=replace(config.optim, updates_per_rollout=1)), tmp_path,
        kit.brightness,
    )  # fmt: skip
    assert one.train_step()["ratio/max_deviation"] < 1e-6


def test_means_are_kept_only_where_they_are_needed(kit):
    rollout, _ = moved(kit, "cps", samples=6)
    assert rollout[[1, 4]].means.equal(rollout.means[[1, 4]])
    assert Rollout.cat([rollout[:2], rollout[2:]]).means.equal(rollout.means)
    assert Rollout.cat([rollout[:2], replace(rollout[2:], means=None)]).means is None
    assert "old_mean" in GrpoGuard().needs and "old_mean" in FlowDppo().needs
    assert FlowGrpo().needs == frozenset()


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="clip_range means nothing here"):
        build_objective("flow_dppo", {"clip_range": 0.2})
    with pytest.raises(ConfigError, match="divergence must be positive, got 0"):
        build_objective("flow_dppo", {"divergence": 0.0})
    with pytest.raises(ConfigError, match="clip_range must be positive"):
        build_objective("grpo_guard", {"clip_range": 0.0})
