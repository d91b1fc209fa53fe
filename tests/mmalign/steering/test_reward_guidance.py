"""Reward guidance: shifts of every parameterisation, the linear law, recurrence, budgets."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from gaussian_bed import GaussianPolicy, linear, quadratic
from hard_prompts import HARD
from redness import redness

from mmalign.policies.load import load_policy
from mmalign.protocols import Steerer
from mmalign.registry import STEERERS
from mmalign.sampling import generate
from mmalign.sampling.process import coefficients, noised, split, target
from mmalign.steering.budget import BudgetError
from mmalign.steering.guidance import RewardGuidance, forward_scale, renoised, shifted
from vision_rewards.factory import load_reward
from vision_rewards.function import FunctionReward

PROMPTS = ["a photo of a red star", "a photo of two circles"]
KINDS = ("flow", "epsilon", "v")


def method(**options) -> RewardGuidance:
    return RewardGuidance(**{"steps": 3, "guidance_scale": 1.0, **options})


def graded(bed_reward):
    """A reward of the Gaussian bed that says it has a gradient."""
    bed_reward.info = replace(bed_reward.info, differentiable=True)
    return bed_reward


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_moves_the_estimate_and_keeps_the_state(kind):
    x0, eps, shift = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor(0.6)
    x = noised(kind, x0, eps, sigma)
    moved = shifted(kind, target(kind, x0, eps, sigma), sigma, shift)
    clean, noise = split(kind, x, sigma, moved)
    torch.testing.assert_close(clean, x0 + shift, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(noised(kind, clean, noise, sigma), x, rtol=1e-4, atol=1e-5)


def test_on_a_flow_it_is_the_published_term():
    u, g, sigma = torch.randn(1, 4), torch.randn(1, 4), torch.tensor(0.6)
    moved = shifted("flow", u, sigma, 2.0 * forward_scale("flow", sigma, 100.0) * g)
    torch.testing.assert_close(moved, u - 2.0 * 0.6 / 0.4 * g)
    at_noise = forward_scale("flow", torch.tensor(1.0), 3.0)
    assert float(at_noise) == 3.0  # where it would be infinite


@pytest.mark.parametrize("kind", KINDS)
def test_noise_added_back_restores_the_level(kind):
    low, high = torch.tensor(0.3), torch.tensor(0.8)
    x0 = torch.full((20000, 1), 2.0)
    generator = torch.Generator().manual_seed(0)
    eps, fresh = torch.randn(2, 20000, 1, generator=generator)
    x = renoised(kind, noised(kind, x0, eps, low), low, high, fresh)
    a, b = coefficients(kind, high)
    assert float(x.mean()) == pytest.approx(float(2 * a), abs=0.03)
    assert float(x.std()) == pytest.approx(float(b), rel=0.03)
    # Nothing but the level: what was there is kept in proportion.
    a_low, b_low = coefficients(kind, low)
    noise = x - a * 2.0
    kept = float((noise * eps).mean())
    assert kept == pytest.approx(float(b_low * a / a_low), abs=0.03)


def test_without_strength_it_is_plain_sampling(tiny_policy, reward):
    result = method(strength=0.0).run(tiny_policy, reward, PROMPTS)
    seeds = [line["seed"] for line in result.lineage]
    plain, _ = generate(tiny_policy, PROMPTS, seeds, steps=3, guidance_scale=1.0)
    torch.testing.assert_close(result.media.data, plain.data)
    assert result.nfe == 6 and result.reward_calls == 2


def test_a_linear_reward_moves_the_law_as_it_should():
    # The score of the tilted law N(l a, 1) is exactly the guided one. Sampling starts without the
    # law's mean at the first level, l a sqrt(abar), and on N(0, 1) the ODE keeps what it is given.
    options = {"steps": None, "n": 1500, "batch_size": 2000, "normalise": False, "cap": 1e6}
    plain, moved = (
        method(**options, strength=s).run(GaussianPolicy(), graded(linear(1.0)), ["x"])
        for s in (0.0, 0.8)
    )
    shift = moved.candidates.data.mean() - plain.candidates.data.mean()
    signal = float((1 - GaussianPolicy().sigmas(50)[0].square()).sqrt())
    assert float(shift) == pytest.approx(0.8 * (1 - signal), abs=0.02)
    assert float(moved.candidates.data.std()) == pytest.approx(
        float(plain.candidates.data.std()), rel=0.02
    )


def test_the_backward_shift_needs_no_gradient_of_the_network():
    options = {"steps": None, "strength": 0.0, "backward_rate": 0.5, "normalise": False}
    plain, moved = (
        method(**options, backward=m).run(GaussianPolicy(), graded(quadratic(1.5)), ["x"])
        for m in (0, 2)
    )
    assert abs(float(moved.media.data) - 1.5) < 0.1 * abs(float(plain.media.data) - 1.5)
    assert moved.reward_calls == 50 * 2 + 1 and moved.nfe == 50


@pytest.mark.parametrize("options", [{}, {"through": "fixed"}, {"strength": 0.0, "backward": 2}])
def test_it_raises_the_reward(tiny_policy, reward, options):
    plain = method(strength=0.0).run(tiny_policy, reward, PROMPTS)
    guided = method(**options).run(tiny_policy, reward, PROMPTS)
    assert (guided.scores.value > plain.scores.value).all()
    assert {line["prompt"] for line in guided.trace} == {0, 1} and len(guided.trace) == 6


def test_normalised_gradients_forget_the_rewards_scale(tiny_policy, reward):
    loud = FunctionReward(lambda x, p: 1000 * redness(x, p), takes="tensor", differentiable=True)
    quiet, same = (method().run(tiny_policy, r, PROMPTS) for r in (reward, loud))
    torch.testing.assert_close(quiet.media.data, same.media.data, rtol=1e-3, atol=1e-4)
    raw, other = (method(normalise=False).run(tiny_policy, r, PROMPTS) for r in (reward, loud))
    assert not torch.allclose(raw.media.data, other.media.data, atol=1e-3)


def test_recurrence_and_window_cost_what_they_say(tiny_policy, reward):
    twice = method(recurrence=2).run(tiny_policy, reward, PROMPTS)
    assert twice.nfe == 2 * 3 * 2 and twice.reward_calls == 2 * (3 * 2 + 1)
    once = method().run(tiny_policy, reward, PROMPTS)
    assert not torch.allclose(once.media.data, twice.media.data, atol=1e-4)
    late = method(start=0.67).run(tiny_policy, reward, PROMPTS)
    assert late.nfe == 6 and late.reward_calls == 2 * 2
    assert {line["step"] for line in late.trace} == {2}


def test_neither_batch_nor_other_prompts_matter(tiny_policy, reward):
    whole = method(n=2, recurrence=2).run(tiny_policy, reward, PROMPTS)
    alone = method(n=2, recurrence=2, batch_size=1).run(tiny_policy, reward, PROMPTS[1:])
    torch.testing.assert_close(
        whole.candidates.data[2:], alone.candidates.data, rtol=1e-3, atol=1e-4
    )


def test_budgets_take_samples_and_time_ends_guidance(tiny_policy, reward):
    assert len(method(n=3).run(tiny_policy, reward, PROMPTS, budget="nfe=6").candidates) == 4
    with pytest.raises(BudgetError, match="does not allow one sample, which takes nfe=3"):
        method().run(tiny_policy, reward, PROMPTS, budget="reward_calls=3")

    def slow(images, prompts):
        time.sleep(0.05)
        return redness(images, prompts)

    late = FunctionReward(slow, takes="tensor", differentiable=True)
    result = method(steps=8).run(tiny_policy, late, PROMPTS, budget={"seconds": 0.02})
    assert len(result.trace) < 2 * 8 and result.nfe == 2 * 8


def test_what_is_not_scored_is_not_guided(tiny_policy):
    def blind(images, prompts):
        known = torch.tensor([p != PROMPTS[0] or len(images) == 1 for p in prompts])
        return torch.where(known, redness(images, prompts), torch.nan)

    some = FunctionReward(blind, takes="tensor", differentiable=True)
    with pytest.raises(ValueError, match="could score none of the 1 candidates"):
        method().run(tiny_policy, some, PROMPTS)
    both = method(n=2).run(tiny_policy, FunctionReward(_every_other, "half", takes="tensor",
                           differentiable=True), PROMPTS[:1])  # fmt: skip
    plain, _ = generate(
        tiny_policy, PROMPTS[:1], [both.lineage[0]["seed"]], steps=3, guidance_scale=1.0
    )
    torch.testing.assert_close(both.candidates.data[:1], plain.data)
    assert both.trace[0]["values"][0] is None and both.trace[0]["shift"][0] == 0
    assert both.chosen == (1,)


def _every_other(images, prompts):
    values = redness(images, prompts)
    return torch.where(torch.arange(len(values)) % 2 == 0, torch.nan, values)


def test_what_cannot_work_stops_before_the_network(tiny_policy, monkeypatch):
    monkeypatch.setattr(tiny_policy, "predict", pytest.fail)
    black = FunctionReward(redness, takes="tensor")
    with pytest.raises(ValueError, match="reward_guidance follows the gradient"):
        method().run(tiny_policy, black, PROMPTS)
    for options in ({"strength": -1}, {"recurrence": 0}, {"backward": -1}, {"through": "x"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RewardGuidance(**options)
    with pytest.raises(ValueError, match="start <= stop"):
        RewardGuidance(start=0.8, stop=0.2)


def test_it_raises_the_reward_of_real_pictures():
    policy, clip = load_policy("shapes-flow"), load_reward("shapes_clip")
    plain, guided = (
        RewardGuidance(n=2, steps=8, guidance_scale=2.0, strength=s).run(policy, clip, HARD)
        for s in (0.0, 0.2)
    )
    held, twice = load_reward("shapes_partial"), [p for p in HARD for _ in (0, 1)]
    before, after = (held.score(r.candidates, twice) for r in (plain, guided))
    print("shapes_clip", plain.candidate_scores.value, guided.candidate_scores.value)
    print("verifier", before.value, after.value)
    assert float(guided.candidate_scores.value.mean() - plain.candidate_scores.value.mean()) > 0.03
    assert STEERERS.load("reward_guidance") is RewardGuidance
    assert isinstance(RewardGuidance(), Steerer)
