"""FK steering: the law it samples on an exact model, and the rules every method keeps."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
import torch
from gaussian_bed import ExactKernel, GaussianPolicy, moments, quadratic

from mmalign.protocols import Steerer
from mmalign.registry import STEERERS, UnknownNameError
from mmalign.sampling import DdimKernel, FlowSdeKernel, KernelMismatchError, OdeKernel
from mmalign.steering.budget import BudgetError
from mmalign.steering.feynman_kac import Filter, Rule, visited
from mmalign.steering.fk import Fk
from mmalign.types import Media, Score
from vision_rewards.function import FunctionReward

PROMPTS = ["a photo of a red star", "a photo of two circles"]


# -- the law -----------------------------------------------------------------------------------

ALWAYS = {"threshold": None}
FEW = {"strength": 0.3, "start": 20, "stop": 40, "every": 20, "threshold": None}


def on_the_bed(k: int = 1500, **options):
    usual = {"strength": 1.0, "start": 5, "stop": 45, "every": 5, "batch_size": 10**6}
    method = Fk(k=k, kernel=ExactKernel(), **{**usual, **options})
    return method.run(GaussianPolicy(), quadratic(1.5), ["any"])


# Errors are standard deviations over seeds; what is resampled by steeper weights has larger ones.
@pytest.mark.parametrize(
    ("options", "mean", "error"),
    [
        ({"potential": "difference", **ALWAYS}, 0.750, 0.016),
        ({"potential": "difference", "threshold": 0.5}, 0.750, 0.016),  # carried to the end
        ({"potential": "difference", "threshold": 0.9}, 0.750, 0.016),  # carried, then resampled
        ({"potential": "difference", "estimate": "lagged", **ALWAYS}, 0.750, 0.016),
        ({"potential": "difference", "tempering": "linear", **ALWAYS}, 0.750, 0.020),
        ({"potential": "difference", "tempering": 0.05, **ALWAYS}, 0.750, 0.032),
        ({"potential": "difference", "scheme": "ssp", **ALWAYS}, 0.750, 0.016),
        ({"potential": "max", **FEW}, 0.346, 0.023),
        ({"potential": "sum", **FEW}, 0.346, 0.023),
        ({"potential": "immediate", **FEW}, 0.346, 0.023),
        ({"strength": 0.0}, 0.0, 0.023),
    ],
)
def test_particles_follow_the_tilted_law(options, mean, error):
    strength = options.get("strength", 1.0)
    result = on_the_bed(**options)
    found, variance = moments(result)
    print(f"{options}: mean {found:.3f} variance {variance:.3f}")
    assert abs(found - mean) <= 4 * error
    assert abs(variance - 1 / (1 + strength)) <= 4 * 0.025
    resampled = [line for line in result.trace if line.get("resampled")]
    if options.get("threshold") == 0.5 or strength == 0:
        assert not resampled  # every single visit leaves most of the effective size
    elif options.get("threshold") is None:
        assert len(resampled) == len(result.trace) - 1
    else:
        assert 0 < len(resampled) < len(result.trace) - 1


def test_max_over_many_visits_still_ends_in_the_reward():
    found, variance = moments(on_the_bed(potential="max", **ALWAYS))
    assert abs(found - 0.75) <= 4 * 0.09  # the running maximum as last weight gives 0.41
    assert variance < 0.75


@pytest.mark.parametrize("potential", ["difference", "max", "sum", "immediate"])
@pytest.mark.parametrize("threshold", [None, 0.6])
def test_potentials_multiply_to_the_reward_along_every_lineage(potential, threshold):
    rule = Rule(potential=potential, strength=2.5, tempering="linear", threshold=threshold)
    found = Filter(["a", "b"], 6, rule)
    found.state["id"] = torch.arange(12)
    for step in (3, 5, 8):
        rows = found.visit(Score.of(torch.randn(12, generator=seeded(step))), step, 10)
        assert (rows // 6).equal(torch.arange(2).repeat_interleave(6))
    found.last(Score.of(values := torch.randn(12, generator=seeded(10))), 10)
    torch.testing.assert_close(
        found.state["log_potential"], 2.5 * values.double(), rtol=0, atol=1e-6
    )
    # The tree says where each row came from.
    lines = found.lineage(range(12))
    assert [line["seed"] for line in lines] == found.state["id"].tolist()
    assert [line["root"] for line in lines] == (found.state["id"] % 6).tolist()
    assert all(len(line["ancestors"]) == 3 for line in lines)
    for prompt in (0, 1):
        visits = [t for t in found.trace if t["prompt"] == prompt and t["event"] == "visit"]
        for place in range(6):
            path, at = [], place
            for visit in reversed(visits):
                path.append(at := visit["ancestors"][at])
            assert lines[prompt * 6 + place]["ancestors"] == path[::-1]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_constant_in_the_reward_changes_no_ancestor():
    for potential in ("difference", "max", "immediate"):
        plain, shifted = (Filter(["a"], 8, Rule(potential=potential, threshold=None)) for _ in "ab")
        for step in (2, 4, 6):
            values = torch.randn(8, generator=seeded(step), dtype=torch.float64)
            one = plain.visit(Score.of(values), step, 8)
            assert shifted.visit(Score.of(values + 64.0), step, 8).equal(one)


def test_strengths_grow_to_the_whole():
    linear, rate = Rule(strength=4.0, tempering="linear"), Rule(strength=4.0, tempering=0.1)
    assert [linear.strength_at(n, 4) for n in (1, 2, 4)] == [1.0, 2.0, 4.0]
    assert rate.strength_at(2, 40) == pytest.approx(4 * (1.1**2 - 1))
    assert rate.strength_at(39, 40) == rate.strength_at(40, 40) == 4.0
    assert Rule(strength=4.0).strength_at(1, 40) == 4.0


def test_visits_by_share_and_by_number():
    assert visited(100, 0.2, 0.8, 0.2) == (20, 40, 60, 80)
    assert visited(28, 0.2, 0.8, 0.2) == (6, 11, 17, 22)
    assert visited(100, 5, 30, 5) == (5, 10, 15, 20, 25, 30)
    assert visited(4, 0.2, 0.8, 0.2) == (1, 2, 3) and visited(1, 0.0, 1.0, 1) == ()
    assert visited(10, 1, 1.0, 1) == tuple(range(1, 10))
    with pytest.raises(ValueError, match=r"stop must be .* got 1\.5"):
        visited(10, 0, 1.5, 1)
    with pytest.raises(ValueError, match="every must be above 0"):
        visited(10, 0, 1.0, 0)


# -- on a network ------------------------------------------------------------------------------


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Mean red."""
    return images[:, 0].mean((1, 2))


@pytest.fixture
def reward():
    return FunctionReward(red, takes="tensor")


def method(**options) -> Fk:
    usual = {"k": 4, "steps": 5, "guidance_scale": 1.0, "strength": 200.0, "threshold": None}
    return Fk(**{**usual, **options})


def test_what_comes_back(tiny_policy, reward):
    result = method().run(tiny_policy, reward, PROMPTS)
    visits = [t for t in result.trace if t["event"] == "visit"]
    assert Counter(t["prompt"] for t in visits) == {0: 4, 1: 4}
    assert result.nfe == 2 * 4 * 5 and result.reward_calls == result.spent.decodes == 2 * 4 * 5
    assert len(result.candidates) == 8 and len(result.lineage) == 8
    for prompt in (0, 1):
        lines = [line for line in result.lineage if line["prompt"] == prompt]
        assert sum(line["weight"] for line in lines) == pytest.approx(1.0)
        assert sorted(line["rank"] for line in lines) == [1, 2, 3, 4]
        assert {len(line["ancestors"]) for line in lines} == {4}
        assert [t["step"] for t in visits if t["prompt"] == prompt] == [1, 2, 3, 4]
    assert all(t["resampled"] and sorted(t["ancestors"])[0] >= 0 for t in visits)
    assert any(t["ancestors"] != [0, 1, 2, 3] for t in visits)
    best = result.candidate_scores.value.view(2, 4).max(1).values
    assert result.scores.value.equal(best)  # choose="reward"


def test_steering_gains_reward_and_choice_can_go_by_weight(tiny_policy, reward):
    plain = method(strength=0.0).run(tiny_policy, reward, PROMPTS)
    steered = method(strength=3000.0).run(tiny_policy, reward, PROMPTS)
    assert steered.candidate_scores.value.mean() > plain.candidate_scores.value.mean()
    assert not any(t["event"] == "visit" for t in plain.trace) and plain.reward_calls == 8
    by_weight = method(choose="weight").run(tiny_policy, reward, PROMPTS)
    weights = torch.tensor([line["weight"] for line in by_weight.lineage]).view(2, 4)
    assert by_weight.chosen == (int(weights[0].argmax()), 4 + int(weights[1].argmax()))


def test_draws_follow_the_weights():
    found = Filter(["a"], 3, Rule(strength=1.0))
    found.last(scores := Score.of(torch.tensor([0.0, math.log(2.0), math.log(5.0)])), 1)
    counts = Counter()
    for seed in range(800):
        found.key = ("draw", seed)
        counts[int(found.order("draw", scores).argmax())] += 1
    for place, weight in enumerate((1 / 8, 2 / 8, 5 / 8)):
        assert abs(counts[place] / 800 - weight) < 4 * math.sqrt(weight / 800)


def test_no_strength_and_one_particle_are_plain_sampling(tiny_policy, reward):
    plain = method(strength=0.0).run(tiny_policy, reward, PROMPTS)
    one = method(k=1).run(tiny_policy, reward, PROMPTS)
    torch.testing.assert_close(one.media.data, plain.candidates.data[[0, 4]], rtol=1e-4, atol=1e-5)
    assert one.reward_calls == 2
    # Particles that are visited and never resampled go where they would have gone.
    visited_only = method(strength=1e-9, threshold=0.5).run(tiny_policy, reward, PROMPTS)
    assert not any(t.get("resampled") for t in visited_only.trace)
    assert visited_only.candidates.data.equal(plain.candidates.data)


@pytest.mark.parametrize("size", [3, 32])
def test_batch_size_and_other_prompts_change_nothing(tiny_policy, reward, size):
    both = method(batch_size=8).run(tiny_policy, reward, PROMPTS)
    alone = method(batch_size=size).run(tiny_policy, reward, PROMPTS[1:])
    torch.testing.assert_close(
        both.candidates.data[4:], alone.candidates.data, rtol=1e-4, atol=1e-5
    )
    together = [t["ancestors"] for t in both.trace if t["prompt"] == 1 and t["event"] == "visit"]
    assert together == [t["ancestors"] for t in alone.trace if t["event"] == "visit"]
    other = method(seed=1).run(tiny_policy, reward, PROMPTS[1:])
    assert not other.candidates.data.equal(alone.candidates.data)


def test_copies_part_ways(tiny_policy, reward):
    result = method(strength=1e6, start=1, stop=1, every=1).run(tiny_policy, reward, PROMPTS[:1])
    assert len({line["root"] for line in result.lineage}) == 1
    apart = torch.pdist(result.candidates.data.flatten(1))
    assert apart.min() > 1e-3


def test_unscored_particles_are_dropped_with_a_note(tiny_policy):
    def picky(images, prompts):
        if len(images) == 4:  # particle 2 of whatever comes
            return [0.0, 0.1, None, 0.0]
        return [0.0] * len(images)

    options = {"strength": 1.0, "batch_size": 4, "start": 2, "stop": 2}
    result = method(**options).run(tiny_policy, FunctionReward(picky), PROMPTS[:1])
    first = result.trace[0]
    assert first["values"][2] is None and first["log_weights"][2] is None
    assert first["dropped"] == [2] and 2 not in first["ancestors"] and first["notes"]
    assert result.lineage[2]["weight"] == 0 and result.lineage[2]["rank"] is None


def test_estimates_may_be_unscored_altogether(tiny_policy, reward):
    calls = []

    def late(images, prompts):
        calls.append(len(images))
        return [None if len(calls) <= 2 else 1.0] * len(images)

    result = method(start=1, stop=2, every=1).run(tiny_policy, FunctionReward(late), PROMPTS[:1])
    assert [t["values"] for t in result.trace[:2]] == [[None] * 4] * 2
    assert [line["weight"] for line in result.lineage] == pytest.approx([0.25] * 4)


def test_budgets_lower_the_particles_then_the_visits(tiny_policy, reward):
    half = method().run(tiny_policy, reward, PROMPTS, budget={"nfe": 14})
    assert half.nfe == 2 * 2 * 5 and len(half.candidates) == 4
    few = method().run(tiny_policy, reward, PROMPTS, budget="reward_calls=3")
    assert few.reward_calls == 2 * 3 and not any(t["event"] == "visit" for t in few.trace)
    with pytest.raises(BudgetError, match="does not allow one particle"):
        method().run(tiny_policy, reward, PROMPTS, budget="nfe=4")


def test_when_time_is_over_the_heaviest_goes_on(tiny_policy):
    def slow(images, prompts):
        time.sleep(0.4)
        return images[:, 0].mean((1, 2))

    result = method().run(
        tiny_policy, FunctionReward(slow, takes="tensor"), PROMPTS, budget={"seconds": 0.15}
    )
    assert len(result.candidates) == 2 and result.chosen == (0, 1)
    hurried = [t for t in result.trace if t["event"] == "hurry"]
    assert [t["prompt"] for t in hurried] == [0, 1]
    assert result.nfe < 2 * 4 * 5


def test_hurry_keeps_the_heaviest_and_then_the_most_valued():
    found = Filter(["a", "b", "c"], 3, Rule(strength=1.0, threshold=0.4))
    found.state["id"] = torch.arange(9)
    assert Filter(["a"], 3, Rule()).hurry(0, 4).tolist() == [0]
    values = torch.tensor([0.0, 0.2, 0.1, 0.0, 0.1, 0.3, -60.0, 0.0, 0.01])
    found.visit(Score.of(values), 2, 4)
    assert found.hurry(2, 4).tolist() == [1, 5, 8]
    assert found.state["id"].tolist() == [1, 5, 8] and found.population.each == 1
    # Resampling at every visit leaves equal weights; the values are still known.
    always = Filter(["a"], 3, Rule(strength=0.1, threshold=None))
    always.visit(Score.of(torch.tensor([0.0, 0.1, 0.05])), 2, 4)
    assert always.hurry(2, 4).tolist() == [1]


def test_a_cheap_decoder_serves_on_the_way_only(tiny_policy, reward):
    sizes = []

    def cheap(latents):
        sizes.append(len(latents))
        return Media(latents[:, :3].sigmoid())

    result = method(decoder=cheap).run(tiny_policy, reward, PROMPTS)
    assert sizes == [8] * 4 and result.media.data.shape[-1] == 32


def test_who_watches_sees_it_grow(tiny_policy, reward):
    seen = []
    method().run(tiny_policy, reward, PROMPTS, watch=seen.append)
    assert [s.done for s in seen] == [1, 2, 3, 4, 5] and {s.total for s in seen} == {5}
    assert seen[-1].media is not None and torch.isfinite(seen[-1].best).all()


def test_kernels_must_fit_and_be_stochastic(tiny_policy, reward, monkeypatch):
    monkeypatch.setattr(tiny_policy, "predict", pytest.fail)
    for kernel in ("ode", OdeKernel(), DdimKernel(eta=0.0)):
        with pytest.raises(ValueError, match=r"adds no noise.*use cps"):
            method(kernel=kernel)
    with pytest.raises(KernelMismatchError, match="made for epsilon"):
        method(kernel="ddim").run(tiny_policy, reward, PROMPTS)
    with pytest.raises(ValueError, match="noise_level: set it in the kernel object"):
        method(kernel=FlowSdeKernel(), kernel_options={"noise_level": 0.1})


def test_flow_sde_leaves_no_noise_in_the_picture(tiny_policy, reward):
    result = method(kernel="flow_sde", strength=0.0, steps=1).run(tiny_policy, reward, PROMPTS)
    cps = method(kernel="cps", strength=0.0, steps=1).run(tiny_policy, reward, PROMPTS)
    torch.testing.assert_close(result.candidates.data, cps.candidates.data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 0}, "k must be a whole number from 1"),
        ({"strength": -1.0}, "strength must be a number from 0.*negative weight"),
        ({"threshold": 0.0}, r"threshold must lie in \(0, 1\]"),
        ({"tempering": "cubic"}, "tempering must be None"),
        ({"start": -1}, "start must be"),
    ],
)
def test_bad_options_are_explained(options, said):
    with pytest.raises(ValueError, match=said):
        Fk(**options)


def test_misspelt_options_name_the_nearest():
    for name, value, near in (
        ("potential", "diference", "difference"), ("scheme", "sspp", "ssp"),
        ("choose", "weigth", "weight"), ("estimate", "lag", "lagged"),
    ):  # fmt: skip
        with pytest.raises(UnknownNameError, match=repr(near)):
            Fk(**{name: value})


def test_it_is_registered():
    assert STEERERS.load("fk") is Fk and isinstance(Fk(), Steerer)
