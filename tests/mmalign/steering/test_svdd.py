"""SVDD: the law it samples on an exact model, which child is picked, what it costs."""

from __future__ import annotations

import math
import time

import pytest
import torch
from gaussian_bed import STEPS, ExactKernel, GaussianPolicy, linear, quadratic

from mmalign.protocols import Steerer
from mmalign.registry import STEERERS
from mmalign.steering.budget import BudgetError
from mmalign.steering.fk import Fk
from mmalign.steering.svdd import Svdd, pick
from vision_rewards.function import FunctionReward

PROMPTS = ["a photo of a red star", "a photo of two circles"]


def on_the_bed(reward, n: int = 500, **options):
    method = Svdd(n=n, kernel=ExactKernel(), **{"batch_size": 10**6, **options})
    x = method.run(GaussianPolicy(), reward, ["any"]).candidates.data.flatten()
    return float(x.mean()), float(x.var())


def test_many_children_follow_the_tilted_law():
    """For a linear reward the clean estimate gives the exact value, up to a constant.

    The initial noise is not chosen, which leaves the mean 0.05 short.
    """
    mean, variance = on_the_bed(linear(1.0), children=32, alpha=1.0)
    print(f"mean {mean:.3f} variance {variance:.3f}")
    assert abs(mean - 1.0) <= 4 / math.sqrt(500) and abs(variance - 1.0) <= 4 * math.sqrt(2 / 500)


def test_a_value_of_ones_own_makes_a_curved_reward_exact():
    """``log E[exp(r(x0)) | x']`` for ``r = -(x0 - c)^2 / 2``, where x0 is N(sqrt(abar) x', s^2)."""

    def value(x, sigma, prompts):
        spread = sigma.float().square()  # 1 - abar: the variance of x0 given x'
        clean = (1 - spread).sqrt() * x.flatten()
        return -0.5 * (clean - 1.5) ** 2 / (1 + spread)

    reward = quadratic(1.5)
    mean, variance = on_the_bed(reward, children=32, alpha=1.0, value=value)
    print(f"mean {mean:.3f} variance {variance:.3f}")
    assert abs(mean - 0.75) <= 4 * math.sqrt(0.5 / 500)
    assert abs(variance - 0.5) <= 4 * 0.5 * math.sqrt(2 / 500)
    assert reward.calls == 1  # the finished samples alone


@pytest.mark.parametrize("options", [{"children": 1}, {"children": 4, "alpha": math.inf}])
def test_without_preference_it_is_plain_sampling(options):
    mean, variance = on_the_bed(linear(5.0), **options)
    assert abs(mean) <= 4 / math.sqrt(500) and abs(variance - 1.0) <= 4 * math.sqrt(2 / 500)


def test_children_are_drawn_by_their_value():
    values = torch.tensor([[0.0, math.log(3.0), -math.inf]], dtype=torch.float64)
    generators = [torch.Generator().manual_seed(0)]
    drawn = torch.stack([pick(values, 1.0, generators) for _ in range(800)])
    assert abs(float((drawn == 1).double().mean()) - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 800)
    assert not (drawn == 2).any()
    assert pick(values, 0.0, generators).tolist() == [1]
    sharp = torch.stack([pick(values, 0.01, generators) for _ in range(50)])
    assert (sharp == 1).all()


# -- on a network ------------------------------------------------------------------------------


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Mean red."""
    return images[:, 0].mean((1, 2))


@pytest.fixture
def reward():
    return FunctionReward(red, takes="tensor")


def method(**options) -> Svdd:
    return Svdd(**{"n": 2, "children": 3, "steps": 4, "guidance_scale": 1.0, **options})


def test_what_comes_back(tiny_policy, reward):
    result = method().run(tiny_policy, reward, PROMPTS)
    # One call at the start, then three for each of the three steps with children.
    assert result.nfe == 4 * (1 + 3 * 3) and result.reward_calls == 4 * (3 * 3 + 1)
    assert len(result.candidates) == 4 and len(result.trace) == 6
    for line in result.trace:
        values = torch.tensor(line["values"])
        assert values.shape == (2, 3) and line["picked"] == values.argmax(1).tolist()
    assert [(t["prompt"], t["step"]) for t in result.trace] == [
        (p, step) for step in (1, 2, 3) for p in (0, 1)
    ]
    plain = method(children=1).run(tiny_policy, reward, PROMPTS)
    assert plain.nfe == 4 * 4 and plain.reward_calls == 4 and not plain.trace
    assert result.candidate_scores.value.mean() > plain.candidate_scores.value.mean()


def test_one_child_is_the_plain_sampler(tiny_policy, reward):
    """Stepping by hand with the same noise gives the same picture: the reused call is right."""
    from mmalign.sampling import FlowSdeKernel
    from mmalign.sampling.kernels import OdeKernel
    from mmalign.steering.particles import Noise

    result = method(n=1, children=1).run(tiny_policy, reward, PROMPTS[:1])
    seed = result.lineage[0]["seed"]
    x, noise = tiny_policy.init_noise([seed]), Noise([seed])
    given, sigmas = tiny_policy.encode(PROMPTS[:1]), tiny_policy.sigmas(4)
    with torch.no_grad():
        for n in range(4):
            v = tiny_policy.predict(x, sigmas[n], given, 1.0)
            kernel = FlowSdeKernel() if n < 3 else OdeKernel()
            x = kernel.step(x, sigmas[n], sigmas[n + 1], v, noise.draw(x)).x_next
        expected = tiny_policy.decode(x).data
    torch.testing.assert_close(result.media.data, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_batch_size_and_other_prompts_change_nothing(tiny_policy, reward, alpha):
    both = method(alpha=alpha, batch_size=7).run(tiny_policy, reward, PROMPTS)
    alone = method(alpha=alpha).run(tiny_policy, reward, PROMPTS[1:])
    torch.testing.assert_close(
        both.candidates.data[2:], alone.candidates.data, rtol=1e-4, atol=1e-5
    )


def test_unscored_children_are_not_picked(tiny_policy):
    def picky(images, prompts):
        first = len(images) == 9  # of three children, not of the finished samples
        return [None if first and i % 3 == 0 else 0.0 for i in range(len(images))]

    result = method(n=1).run(tiny_policy, FunctionReward(picky), [*PROMPTS, "a photo of a cross"])
    assert all(t["picked"] == [1] and t["values"] == [[None, 0.0, 0.0]] for t in result.trace
               if t["prompt"] == 1)  # fmt: skip
    assert all(t["notes"] for t in result.trace)


def test_children_unscored_altogether_leave_the_first(tiny_policy):
    calls = []

    def late(images, prompts):
        calls.append(len(images))
        return [None if len(calls) < 4 else 1.0] * len(images)

    result = method().run(tiny_policy, FunctionReward(late), PROMPTS)
    assert all(t["picked"] == [0, 0] for t in result.trace) and result.scores.valid.all()


def test_budgets_lower_the_children_then_the_samples(tiny_policy, reward):
    fewer = method().run(tiny_policy, reward, PROMPTS, budget="nfe=14")
    assert fewer.nfe == 4 * (1 + 2 * 3)
    none = method().run(tiny_policy, reward, PROMPTS, budget="nfe=8")
    assert none.nfe == 2 * 8 and none.reward_calls == 4
    one = method().run(tiny_policy, reward, PROMPTS, budget="nfe=5")
    assert len(one.candidates) == 2
    with pytest.raises(BudgetError, match="does not allow one sample"):
        method().run(tiny_policy, reward, PROMPTS, budget="nfe=3")


def test_when_time_is_over_there_are_no_more_children(tiny_policy):
    def slow(images, prompts):
        time.sleep(0.4)
        return images[:, 0].mean((1, 2))

    result = method().run(
        tiny_policy, FunctionReward(slow, takes="tensor"), PROMPTS, budget={"seconds": 0.15}
    )
    assert {t["step"] for t in result.trace} == {1} and len(result.candidates) == 4


def test_the_deterministic_kernel_is_refused(tiny_policy, reward):
    with pytest.raises(ValueError, match="adds no noise"):
        method(kernel="ode")
    same = method(children=1).run(tiny_policy, reward, PROMPTS)
    fk = Fk(k=2, strength=0.0, steps=4, guidance_scale=1.0).run(tiny_policy, reward, PROMPTS)
    assert same.nfe == fk.nfe


@pytest.mark.parametrize(
    ("options", "said"),
    [({"children": 0}, "children must be a whole"), ({"alpha": -1.0}, "alpha must be 0")],
)
def test_bad_options_are_explained(options, said):
    with pytest.raises(ValueError, match=said):
        Svdd(**options)


def test_it_is_registered():
    assert STEERERS.load("svdd") is Svdd and isinstance(Svdd(), Steerer) and STEPS == 50
