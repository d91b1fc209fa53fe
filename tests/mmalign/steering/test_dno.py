"""DNO: the concentration penalty, gradients made of probes, closed forms, budgets."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from gaussian_bed import ExactKernel, GaussianPolicy, quadratic
from redness import redness

from mmalign.policies.load import load_policy
from mmalign.protocols import Steerer
from mmalign.registry import STEERERS
from mmalign.sampling import KernelMismatchError
from mmalign.steering.budget import BudgetError
from mmalign.steering.dno import Adam, Dno, concentration, weighted_differences
from vision_rewards.factory import load_reward
from vision_rewards.function import FunctionReward

PROMPTS = ["a photo of a red star", "a photo of two circles"]
FLAT = 4 * math.log(2)


def method(**options) -> Dno:
    given = {"iterations": 3, "steps": 2, "guidance_scale": 1.0, "block": 2, "permutations": 2}
    return Dno(**given | options)


def orders(count: int, many: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randperm(count, generator=generator) for _ in range(many)]


def last(result, name: str) -> list[float]:
    final = max(line["iteration"] for line in result.trace)
    return [line[name] for line in result.trace if line["iteration"] == final]


def test_fresh_noise_costs_nothing():
    noises = torch.randn(3, 17, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    penalty, gradient = concentration(noises, 64, orders(17 * 1024))
    torch.testing.assert_close(penalty, torch.full((3,), FLAT))
    assert not gradient.any()


@pytest.mark.parametrize("spoil", ["constant", "large", "repeated"])
def test_what_no_gaussian_draws_is_penalised_and_mended(spoil):
    noise = torch.randn(1, 8192, generator=torch.Generator().manual_seed(0))
    if spoil == "constant":
        noise = torch.full_like(noise, 0.5)
    if spoil == "large":
        noise = 2 * noise
    if spoil == "repeated":
        noise[:, 64:] = noise[:, :64].repeat(1, 127)
    before, gradient = concentration(noise, 64, orders(8192))
    assert float(before) > FLAT + 10
    step = 1e-3 / gradient.norm()
    after, _ = concentration(noise - step * gradient, 64, orders(8192))
    assert float(before - after) == pytest.approx(1e-3 * float(gradient.norm()), rel=0.05)


def test_rows_do_not_share_a_penalty():
    noise = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    noise[1] *= 2
    both, _ = concentration(noise, 16, orders(1024))
    alone = [concentration(noise[i : i + 1], 16, orders(1024))[0] for i in (0, 1)]
    torch.testing.assert_close(both, torch.cat(alone))
    with pytest.raises(ValueError, match="1024 noises do not fill one block of 4096"):
        concentration(noise, 4096)


def test_differences_of_a_linear_reward_give_its_gradient():
    generator = torch.Generator().manual_seed(0)
    slope = torch.tensor([1.0, -2.0, 3.0])
    moves = 0.01 * torch.randn(1, 40000, 3, generator=generator)
    gains = moves @ slope
    gains[0, :100] = torch.nan
    found = weighted_differences(moves, gains)[0]
    torch.testing.assert_close(found, slope, rtol=0.05, atol=0.05)
    assert not weighted_differences(moves, torch.full_like(gains, torch.nan)).any()


def test_the_optimiser_is_adamw():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 5, generator=generator)
    theirs = start.clone().requires_grad_(True)
    optimiser, own, x = torch.optim.AdamW([theirs], lr=0.1), Adam(start, 0.1), start.clone()
    for _ in range(4):
        gradient = torch.randn(2, 5, generator=generator)
        theirs.grad = -gradient
        optimiser.step()
        x = own.step(x, gradient, torch.arange(2))
    torch.testing.assert_close(x, theirs.detach())


def graded(bed_reward, differentiable: bool = True):
    """A reward of the Gaussian bed that says whether it has a gradient."""
    bed_reward.info = replace(bed_reward.info, differentiable=differentiable)
    return bed_reward


@pytest.mark.parametrize("exact", [True, False])
def test_a_linear_sampler_reaches_the_optimum(exact):
    options = {"steps": None, "iterations": 30, "rate": 0.2, "clip": math.inf, "penalty": 0.0}
    found = method(**options, kernel=ExactKernel(), block=1, probes=4).run(
        GaussianPolicy(), graded(quadratic(3.0), exact), ["x"]
    )
    assert float(found.media.data) == pytest.approx(3.0, abs=0.05)
    assert float(found.candidates.data[0]) != pytest.approx(3.0, abs=0.3)
    assert found.nfe == 30 * 50 * (1 if exact else 5)


def test_it_climbs_and_keeps_the_best(tiny_policy, reward):
    result = method(rate=0.1).run(tiny_policy, reward, PROMPTS)
    for prompt in (0, 1):
        best = [line["best"] for line in result.trace if line["prompt"] == prompt]
        assert best[-1] > best[0] and all(b >= a for a, b in pairwise(best))
    assert result.nfe == 2 * 3 * 2 and result.reward_calls == 6


def test_the_penalty_keeps_noise_as_it_should_be(tiny_policy, reward):
    free, kept = (
        method(rate=0.3, iterations=8, penalty=p, clip=100.0).run(tiny_policy, reward, PROMPTS)
        for p in (0.0, 100.0)
    )
    pairs = zip(last(free, "penalty"), last(kept, "penalty"), strict=True)
    assert all(loose > tight for loose, tight in pairs)
    assert max(last(free, "penalty")) > FLAT + 1


def test_probes_climb_without_a_gradient(tiny_policy, reward):
    black = FunctionReward(redness, takes="tensor")
    result = method(rate=0.1, probes=6, shake=0.1).run(tiny_policy, black, PROMPTS)
    assert (result.scores.value > result.candidate_scores.value[[0, 2]]).all()
    assert result.reward_calls == 2 * 3 * 7 and result.nfe == 2 * 2 * 3 * 7
    with pytest.raises(ValueError, match="dno follows the gradient"):
        method(gradient="exact").run(tiny_policy, black, PROMPTS)


@pytest.mark.parametrize("gradient", ["exact", "probes"])
def test_neither_batch_nor_other_prompts_matter(tiny_policy, reward, gradient):
    options = {"gradient": gradient, "probes": 2, "shake": 0.1}
    whole = method(**options).run(tiny_policy, reward, PROMPTS)
    alone = method(**options, batch_size=1).run(tiny_policy, reward, PROMPTS[1:])
    torch.testing.assert_close(whole.media.data[1:], alone.media.data, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(
        method(**options, seed=1).run(tiny_policy, reward, PROMPTS).media.data, whole.media.data
    )


def test_budgets(tiny_policy, reward):
    assert method().run(tiny_policy, reward, PROMPTS, budget="nfe=4").nfe == 8
    late = method().run(tiny_policy, reward, PROMPTS, budget={"seconds": 1e-6})
    assert len(late.candidates) == 2
    with pytest.raises(BudgetError, match="reward_calls=17"):
        method(gradient="probes").run(tiny_policy, reward, PROMPTS, budget="reward_calls=9")


def test_what_cannot_work_stops_before_the_network(tiny_policy, reward, monkeypatch):
    monkeypatch.setattr(tiny_policy, "predict", pytest.fail)
    with pytest.raises(ValueError, match="adds no noise"):
        method(kernel="ode").run(tiny_policy, reward, PROMPTS)
    with pytest.raises(KernelMismatchError, match="kernels that fit"):
        method(kernel="ddim").run(tiny_policy, reward, PROMPTS)
    with pytest.raises(ValueError, match="exact"):
        Dno(gradient="exct")
    for name in ("rate", "clip", "shake"):
        with pytest.raises(ValueError, match=f"dno: {name} must be above 0"):
            Dno(**{name: 0})


def test_it_raises_the_reward_of_real_pictures():
    policy, clip = load_policy("shapes-flow"), load_reward("shapes_clip")
    prompts = ["a photo of four purple triangles", "a photo of a yellow circle and a pink cross"]
    result = Dno(iterations=4, steps=4).run(policy, clip, prompts)
    start = result.candidate_scores.value[[0, 2]]
    twice = [p for p in prompts for _ in (0, 1)]
    held = load_reward("shapes_partial").score(result.candidates, twice)
    print("shapes_clip", start, result.scores.value, "verifier", held.value)
    assert (result.scores.value > start + 0.02).all()
    assert STEERERS.load("dno") is Dno and isinstance(Dno(), Steerer)
