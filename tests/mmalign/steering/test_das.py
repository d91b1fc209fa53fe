"""DAS: the target law, unbiased normalisers, what travels with a particle, budgets."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from gaussian_bed import ExactKernel, GaussianPolicy, linear, moments, quadratic
from hard_prompts import HARD
from redness import redness

from mmalign.policies.load import load_policy
from mmalign.protocols import Steerer
from mmalign.registry import STEERERS
from mmalign.sampling.kernels import gaussian_log_prob
from mmalign.sampling.process import kept_signal
from mmalign.steering.budget import BudgetError
from mmalign.steering.das import Das, log_ratio
from vision_rewards.factory import load_reward
from vision_rewards.function import FunctionReward

PROMPTS = ["a photo of a red star", "a photo of two circles"]


def method(**options) -> Das:
    return Das(**{"k": 3, "steps": 4, "guidance_scale": 1.0, **options})


def graded(bed_reward):
    """A reward of the Gaussian bed that says it has a gradient."""
    bed_reward.info = replace(bed_reward.info, differentiable=True)
    return bed_reward


def bed(reward, policy=None, prompts=("x",), **options):
    """A run on the Gaussian bed."""
    given = {"k": 500, "strength": 1.0, "batch_size": 10_000, "kernel": ExactKernel()}
    das = Das(**{**given, "limit": None, **options})
    return das.run(policy or GaussianPolicy(), graded(reward), list(prompts))


def last(result, name: str):
    return [line[name] for line in result.trace if line["event"] == "last"]


def test_the_ratio_is_that_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    mean, shift, noise = torch.randn(3, 2, 4, 8, 8, generator=generator).double()
    std = torch.tensor(0.3, dtype=torch.float64)
    x = mean + shift + std * noise
    exact = gaussian_log_prob(x, mean, std, "sum") - gaussian_log_prob(x, mean + shift, std, "sum")
    torch.testing.assert_close(log_ratio(shift, std, noise), exact)
    assert not log_ratio(shift, torch.zeros(()), noise).any()


def test_a_linear_reward_is_proposed_nearly_exactly():
    # In full from the first step on: a strength that grows is made up for by weights.
    result = bed(linear(1.0), tempering=1.0)
    mean, variance = moments(result)
    sizes = [line["effective_size"] / 500 for line in result.trace]
    assert min(sizes) > 0.93
    # Standard errors of 500 particles: 0.045 and 0.063.
    assert mean == pytest.approx(1.0, abs=0.18) and variance == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("options", [{}, {"limit": 0.05}, {"threshold": None}])
def test_it_draws_from_the_tilted_law(options):
    mean, variance = moments(bed(quadratic(1.5), k=1500, **options))
    assert mean == pytest.approx(0.75, abs=0.12) and variance == pytest.approx(0.5, abs=0.1)


def test_the_normaliser_is_unbiased():
    runs = [bed(linear(1.0), k=20, seed=seed) for seed in range(12)]
    found = torch.tensor([math.exp(last(run, "log_normaliser")[0]) for run in runs])
    error = float(found.std()) / math.sqrt(len(runs))
    assert float(found.mean()) == pytest.approx(math.exp(0.5), abs=4 * error)
    assert error < 0.1


def test_without_strength_all_weigh_the_same_and_nothing_moves():
    result = bed(quadratic(), k=50, strength=0.0)
    weights = torch.tensor([line["weight"] for line in result.lineage])
    assert torch.allclose(weights, torch.full((50,), 0.02))
    assert not any(line["resampled"] for line in result.trace if line["event"] == "visit")
    assert abs(moments(result)[0]) < 0.6


class Recording(GaussianPolicy):
    """Keeps the states its network was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[torch.Tensor] = []

    def predict(self, latents, sigma, conditioning, guidance_scale):
        self.states.append(latents.detach().flatten())
        return super().predict(latents, sigma, conditioning, guidance_scale)


class Checking(ExactKernel):
    """Keeps what each step started from and led to, and checks the prediction it was given."""

    def __init__(self) -> None:
        self.steps: list[tuple] = []

    def step(self, x, sigma, sigma_next, prediction, noise=None, *, x_next=None):
        torch.testing.assert_close(prediction, sigma.float() * x)
        taken = super().step(x, sigma, sigma_next, prediction, noise)
        self.steps.append((x.flatten(), taken.x_next.flatten(), float(taken.std), sigma))
        return taken


def test_predictions_and_gradients_travel_with_their_particles():
    policy, kernel = Recording(), Checking()
    result = bed(quadratic(3.0), policy, ("x", "y"), k=6, kernel=kernel, threshold=None)
    assert any(line["resampled"] for line in result.trace[:-2])
    strengths = [line["strength"] for line in result.trace if line["prompt"] == 0]
    for n in range(len(policy.states) - 1):
        x, unshifted, std, sigma = kernel.steps[n]
        signal = kept_signal(sigma).sqrt()
        pull = strengths[n] * signal * (3.0 - signal * x)  # of the state the step starts from
        expected = unshifted + std**2 * pull
        torch.testing.assert_close(policy.states[n + 1], expected, rtol=1e-3, atol=1e-4)


def test_prompts_never_mix_and_batches_do_not_matter(tiny_policy, reward):
    options = {"strength": 200.0, "threshold": 1.0}
    both = method(**options).run(tiny_policy, reward, PROMPTS)
    alone = method(**options, batch_size=2).run(tiny_policy, reward, PROMPTS[1:])
    torch.testing.assert_close(
        both.candidates.data[3:], alone.candidates.data, rtol=1e-3, atol=1e-4
    )
    assert {line["prompt"] for line in both.lineage} == {0, 1}
    assert both.nfe == 2 * 3 * 4 and both.reward_calls == 2 * 3 * 5


def test_budgets_take_particles_and_time_ends_guidance(tiny_policy, reward):
    assert len(method().run(tiny_policy, reward, PROMPTS, budget="nfe=8").candidates) == 4
    with pytest.raises(BudgetError, match="one particle, which takes reward_calls=5, nfe=4"):
        method().run(tiny_policy, reward, PROMPTS, budget="reward_calls=4")

    def slow(images, prompts):
        time.sleep(0.05)
        return redness(images, prompts)

    late = FunctionReward(slow, takes="tensor", differentiable=True)
    result = method(steps=8).run(tiny_policy, late, PROMPTS, budget={"seconds": 0.02})
    assert len(result.candidates) == 2 and result.reward_calls < 2 * 3 * 9
    assert [line["event"] for line in result.trace].count("hurry") == 2


def test_unscored_particles_are_dropped(tiny_policy):
    def picky(images, prompts):
        values = redness(images, prompts)
        return torch.where(torch.arange(len(values)) == 0, torch.nan, values)

    some = FunctionReward(picky, takes="tensor", differentiable=True)
    result = method(choose="weight").run(tiny_policy, some, PROMPTS[:1])
    assert result.lineage[0]["rank"] is None and result.lineage[0]["weight"] == 0
    assert result.trace[-1]["dropped"] == [0]
    assert all(torch.isfinite(result.media.data).flatten().tolist())


def test_what_cannot_work_stops_before_the_network(tiny_policy, reward, monkeypatch):
    monkeypatch.setattr(tiny_policy, "predict", pytest.fail)
    black = FunctionReward(redness, takes="tensor")
    with pytest.raises(ValueError, match="das follows the gradient"):
        method().run(tiny_policy, black, PROMPTS)
    with pytest.raises(ValueError, match="adds no noise"):
        method(kernel="ode").run(tiny_policy, reward, PROMPTS)
    for options in ({"limit": 0}, {"strength": -1}, {"k": 0}, {"tempering": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Das(**options)
    with pytest.raises(ValueError, match="through must be denoiser or fixed"):
        Das(through="unet")


def test_strength_grows_as_published():
    hundred, eight = Das().rule(100), Das().rule(8)
    assert hundred.tempering == pytest.approx(0.008, rel=0.01)
    assert eight.tempering == pytest.approx(0.1, rel=0.06)
    assert hundred.strength_at(0, 100) == 0 and hundred.strength_at(90, 100) == 10


def test_it_raises_the_reward_of_real_pictures():
    policy, clip = load_policy("shapes-flow"), load_reward("shapes_clip")
    plain, steered = (
        Das(k=2, steps=8, guidance_scale=2.0, strength=s).run(policy, clip, HARD)
        for s in (0.0, 200.0)
    )
    held, twice = load_reward("shapes_partial"), [p for p in HARD for _ in (0, 1)]
    before, after = (held.score(r.candidates, twice) for r in (plain, steered))
    print("shapes_clip", plain.candidate_scores.value, steered.candidate_scores.value)
    print("verifier", before.value, after.value)
    assert float(steered.candidate_scores.value.mean() - plain.candidate_scores.value.mean()) > 0.02
    assert float(after.value.mean()) > float(before.value.mean())
    assert STEERERS.load("das") is Das and isinstance(Das(), Steerer)
