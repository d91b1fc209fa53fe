"""ReNO: the optimum of a linear model, the prior, what ends a prompt, what it costs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from gaussian_bed import GaussianPolicy, quadratic
from redness import redness

from mmalign.policies.load import load_policy
from mmalign.protocols import Steerer
from mmalign.registry import STEERERS
from mmalign.sampling import generate
from mmalign.sampling.fit import deterministic
from mmalign.steering.budget import BudgetError
from mmalign.steering.gradient import norms, outlook, reward_gradient, sample, sampler_gradient
from mmalign.steering.reno import Reno, chi_pull
from mmalign.types import Score
from vision_rewards.factory import load_reward
from vision_rewards.function import FunctionReward

PROMPTS = ["a photo of a red star", "a photo of two circles"]


def method(**options) -> Reno:
    return Reno(**{"iterations": 4, "steps": 2, "guidance_scale": 1.0, "clip": 1.0, **options})


def graded(bed_reward):
    """A reward of the Gaussian bed that says it has a gradient."""
    bed_reward.info = replace(bed_reward.info, differentiable=True)
    return bed_reward


def values_of(result, prompt: int = 0) -> list[float]:
    return [line["value"] for line in result.trace if line["prompt"] == prompt]


def test_one_iteration_is_the_picture_without_steering(tiny_policy, reward):
    result = method(iterations=1).run(tiny_policy, reward, PROMPTS)
    seeds = [line["seed"] for line in result.lineage]
    plain, _ = generate(tiny_policy, PROMPTS, seeds, steps=2, guidance_scale=1.0)
    torch.testing.assert_close(result.media.data, plain.data)
    assert result.nfe == 4 and result.reward_calls == result.spent.decodes == 2


def test_it_climbs_and_keeps_the_best(tiny_policy, reward):
    result = method().run(tiny_policy, reward, PROMPTS)
    for prompt in (0, 1):
        values = values_of(result, prompt)
        best = [line["best"] for line in result.trace if line["prompt"] == prompt]
        assert all(b >= a for a, b in pairwise(best)) and best[-1] == max(values)
        assert float(result.scores.value[prompt]) == pytest.approx(max(values))
        assert max(values) > values[0]
    start, top = result.lineage[:2]
    assert start["iteration"] == 0 and top["iteration"] > 0 and top["rank"] == 1
    assert result.nfe == 2 * 4 * 2 and all(
        p.grad is None for p in tiny_policy.denoiser.parameters()
    )


def test_a_linear_generator_reaches_the_analytic_optimum():
    result = method(steps=None, iterations=40, rate=0.5, momentum=0.0, clip=math.inf, prior=0).run(
        GaussianPolicy(), graded(quadratic(1.5)), ["x"]
    )
    assert float(result.media.data) == pytest.approx(1.5, abs=1e-3)
    assert float(result.scores.value) == pytest.approx(0.0, abs=1e-5)


def test_a_step_is_no_longer_than_rate_times_clip():
    policy = GaussianPolicy()

    def moved(clip: float, rate: float) -> float:
        options = {"steps": None, "iterations": 2, "rate": rate, "momentum": 0.0, "clip": clip}
        result = method(**options, prior=0).run(policy, graded(quadratic(9.0)), ["x"])
        start, end = result.candidates.data.flatten().tolist()
        noise = float(policy.init_noise([result.lineage[0]["seed"]]))
        return (end - start) * noise / start  # the sampler is linear

    assert moved(0.02, 5.0) == pytest.approx(0.1, rel=1e-3)
    assert moved(math.inf, 0.5) > 1


def test_the_prior_alone_leads_to_the_chi_mode():
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    noise[0] *= 2
    for _ in range(400):
        noise = noise + 5 * 0.01 * chi_pull(noise)
    assert torch.allclose(norms(noise), torch.tensor(1023.0).sqrt(), rtol=1e-3)


def test_neither_batch_nor_other_prompts_matter(tiny_policy, reward):
    whole = method(batch_size=2).run(tiny_policy, reward, PROMPTS)
    parts = method(batch_size=1).run(tiny_policy, reward, PROMPTS)
    alone = method().run(tiny_policy, reward, PROMPTS[1:])
    torch.testing.assert_close(whole.media.data, parts.media.data, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(whole.media.data[1:], alone.media.data, rtol=1e-3, atol=1e-4)
    again = method(batch_size=2).run(tiny_policy, reward, PROMPTS)
    assert again.media.data.equal(whole.media.data)
    other = method(seed=1).run(tiny_policy, reward, PROMPTS)
    assert not torch.allclose(other.media.data, whole.media.data)


def test_half_precision_stays_finite(tiny_policy, reward):
    result = method(dtype="bf16", iterations=3).run(tiny_policy, reward, PROMPTS)
    assert all(math.isfinite(line["norm"]) and line["gradient"] > 0 for line in result.trace)


def test_patience_and_target_end_a_prompt(tiny_policy, reward):
    flat = FunctionReward(lambda x, p: 0 * x.sum((1, 2, 3)), takes="tensor", differentiable=True)
    assert method(patience=2, iterations=9).run(tiny_policy, flat, PROMPTS).reward_calls == 6
    goal = max(values_of(method(iterations=1).run(tiny_policy, reward, PROMPTS), p) for p in (0, 1))
    result = method(target=goal[0]).run(tiny_policy, reward, PROMPTS)
    assert min(len(values_of(result, p)) for p in (0, 1)) == 1


@pytest.mark.parametrize("budget", ["nfe=4", "reward_calls=2", "decodes=2"])
def test_budgets_end_it(tiny_policy, reward, budget):
    result = method().run(tiny_policy, reward, PROMPTS, budget=budget)
    assert len(values_of(result)) == 2


def test_no_time_gives_the_start_and_no_budget_is_an_error(tiny_policy, reward):
    result = method().run(tiny_policy, reward, PROMPTS, budget={"seconds": 1e-6})
    assert [line["iteration"] for line in result.lineage] == [0, 0]
    with pytest.raises(BudgetError, match="does not allow one iteration, which takes nfe=2"):
        method().run(tiny_policy, reward, PROMPTS, budget="nfe=1")


class Forgetful:
    """Judges each prompt once; afterwards it has no score for the first."""

    info = FunctionReward(redness, takes="tensor", differentiable=True).info
    identity = "forgetful"

    def __init__(self, blind: bool = False) -> None:
        self.seen = PROMPTS[0] if blind else ""

    def score(self, media, prompts, context=None) -> Score:
        value = redness(media.data, list(prompts))
        known = torch.tensor([p != self.seen for p in prompts])
        self.seen = PROMPTS[0]
        return Score.of(torch.where(known, value, torch.nan), notes=["lost"] * len(prompts))


def test_unscored_pictures_never_win_and_are_noted(tiny_policy):
    result = method().run(tiny_policy, Forgetful(), PROMPTS)
    assert [line["iteration"] for line in result.lineage if line["prompt"] == 0] == [0]
    first = [line for line in result.trace if line["prompt"] == 0]
    assert [line["value"] is None for line in first] == [False, True, True, True]
    assert first[1]["note"] == "lost" and result.lineage[-1]["iteration"] > 0
    with pytest.raises(ValueError, match=r"could score none of the 1 candidates \(lost\)"):
        method().run(tiny_policy, Forgetful(blind=True), PROMPTS)


def test_what_cannot_work_stops_before_the_network(tiny_policy, monkeypatch):
    monkeypatch.setattr(tiny_policy, "predict", pytest.fail)
    black = FunctionReward(lambda images, prompts: [0.0] * len(images))
    with pytest.raises(ValueError, match="reno follows the gradient of the reward"):
        method().run(tiny_policy, black, PROMPTS)


@pytest.mark.parametrize(
    "options", [{"rate": 0}, {"clip": 0}, {"prior": -1}, {"momentum": 1}, {"patience": 0}]
)
def test_bad_options_are_explained(options):
    with pytest.raises(ValueError, match=f"reno: {next(iter(options))} must"):
        Reno(**options)


def test_many_steps_are_warned_of(tiny_policy, reward, capsys):
    method(iterations=1, steps=9).run(tiny_policy, reward, PROMPTS[:1])
    assert "at most 8" in capsys.readouterr().err
    assert STEERERS.load("reno") is Reno and isinstance(Reno(), Steerer)


# -- the gradients that all these methods share -----------------------------------------------


def test_gradients_agree_with_finite_differences(tiny_policy, reward):
    engine = method().engine(tiny_policy, reward, PROMPTS, None, None, gradient=True)
    owners, kernel, sigma = engine.owners(1), deterministic("flow"), torch.tensor(0.7)
    x = tiny_policy.init_noise([1, 2])
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    cases = {
        "latents": lambda z: reward_gradient(engine, z, owners),
        "state": lambda z: outlook(engine, z, sigma, owners).ascent,
        "sampler": lambda z: sampler_gradient(engine, z.unsqueeze(1), owners, kernel),
    }
    for name, found in cases.items():
        slope = (found(x).gradient.view_as(x) * way).flatten(1).sum(1)
        up, down = found(x + 1e-2 * way).scores.value, found(x - 1e-2 * way).scores.value
        torch.testing.assert_close(slope, (up - down) / 2e-2, rtol=2e-2, atol=2e-4, msg=name)


def test_the_sampler_is_the_stock_pipelines_own_and_so_is_its_gradient(tiny_policy, reward):
    engine = method().engine(tiny_policy, reward, PROMPTS, None, None, gradient=True)
    noise = tiny_policy.init_noise([1, 2])
    stock, own = (noise.clone().requires_grad_(True) for _ in range(2))
    pipeline = tiny_policy.pipeline
    call = type(pipeline).__call__.__wrapped__  # without its no_grad
    theirs = call(
        pipeline, PROMPTS, latents=stock, num_inference_steps=2, guidance_scale=1.0,
        max_sequence_length=0, output_type="latent",
    ).images  # fmt: skip
    ours = sample(engine, own.unsqueeze(1), engine.owners(1), deterministic("flow"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    slopes = [
        torch.autograd.grad(x.square().sum(), z)[0] for x, z in ((ours, own), (theirs, stock))
    ]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


def test_the_gradient_may_stop_at_the_network():
    policy, slope, sigma = GaussianPolicy(), 2.0, torch.tensor(0.6, dtype=torch.float64)
    line = FunctionReward(
        lambda x, p: slope * x.mean((1, 2, 3)), takes="tensor", differentiable=True
    )
    engine = Reno().engine(policy, line, ["x"], None, None, gradient=True)
    x = policy.init_noise([3])
    true = outlook(engine, x, sigma, engine.owners(1)).ascent.gradient
    fixed = outlook(engine, x, sigma, engine.owners(1), "fixed").ascent.gradient
    # sqrt(abar) is 0.8: the estimate is 0.8 x, and (x - 0.6 eps) / 0.8 with eps held.
    assert float(true) == pytest.approx(slope * 0.8) and float(fixed) == pytest.approx(slope / 0.8)


def test_it_raises_the_reward_of_real_pictures():
    policy, clip = load_policy("shapes-flow"), load_reward("shapes_clip")
    prompts = ["a photo of a red star above a blue circle", "a photo of two green squares"]
    result = Reno(iterations=7, steps=2).run(policy, clip, prompts)
    start = result.candidate_scores.value[[0, 2]]
    held = load_reward("shapes_partial").score(
        result.candidates, [p for p in prompts for _ in (0, 1)]
    )
    print("shapes_clip", start, result.scores.value, "verifier", held.value)
    assert (result.scores.value > start + 0.1).all()
