"""Search over noise and paths: geometry, budgets, what is repeatable, and that it helps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from mmalign.policies.load import load_policy
from mmalign.registry import STEERERS
from mmalign.sampling import generate
from mmalign.sampling.generate import integrate
from mmalign.steering import BestOfN, BudgetError
from mmalign.steering.noise_search import RandomSearch, ZeroOrder, neighbours, noise_of
from mmalign.steering.path_search import PathSearch
from vision_rewards.factory import load_reward
from vision_rewards.function import FunctionReward

PROMPTS = ["a photo of a red star", "a photo of two circles"]
FAST = {"steps": 2, "guidance_scale": 1.0}
METHODS = [
    RandomSearch(rounds=2, **FAST),
    ZeroOrder(iterations=2, neighbours=3, **FAST),
    PathSearch(width=2, branch=3, every=1, stop=1.0, steps=4, guidance_scale=1.0),
]


def red(images, prompts):
    return images[:, 0].mean((1, 2))


@pytest.fixture
def reward():
    return FunctionReward(red, takes="tensor")


@pytest.fixture(scope="module")
def flow():
    return load_policy("shapes-flow")


def by_prompt(result, prompt):
    return [i for i, line in enumerate(result.lineage) if line["prompt"] == prompt]


def test_neighbours_keep_norm_and_cosine():
    z, n = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    for cosine in (0.0, 0.5, 0.95):
        near = neighbours(z, n, cosine).flatten(1)
        torch.testing.assert_close(near.norm(dim=1), z.flatten(1).norm(dim=1))
        found = torch.nn.functional.cosine_similarity(near, z.flatten(1))
        torch.testing.assert_close(found, torch.full((5,), cosine), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)
def test_what_is_found_depends_on_neither_batches_nor_other_prompts(tiny_policy, reward, method):
    whole = method.run(tiny_policy, reward, PROMPTS)
    small = type(method)(**{**method.__dict__, "batch_size": 3}).run(tiny_policy, reward, PROMPTS)
    alone = method.run(tiny_policy, reward, PROMPTS[1:])
    assert whole.chosen == small.chosen and whole.lineage == small.lineage
    torch.testing.assert_close(whole.candidates.data, small.candidates.data, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.scores.value[1:], alone.scores.value, rtol=1e-4, atol=1e-6)
    seeds = [whole.lineage[i]["seed"] for i in by_prompt(whole, 1)]
    assert seeds == [line["seed"] for line in alone.lineage]
    assert whole.nfe == small.nfe == 2 * alone.nfe


@pytest.mark.parametrize(
    "method", [*METHODS, BestOfN(n=3, batch_size=2, **FAST)], ids=lambda m: type(m).__name__
)
def test_whoever_watches_sees_the_best_picture_so_far(tiny_policy, reward, method):
    seen = []
    result = method.run(tiny_policy, reward, PROMPTS, watch=seen.append)
    assert seen[-1].done == seen[-1].total
    shown = [s for s in seen if s.media is not None]
    if not isinstance(method, PathSearch):  # its estimates may promise more than the pictures keep
        assert all((b.best >= a.best).all() for a, b in pairwise(shown))
    for snapshot in shown:
        found = red(snapshot.media.data, PROMPTS)
        assert (found >= snapshot.best - 1e-5).all()
    assert shown and len(shown[-1].media) == len(result.prompts)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)
def test_another_seed_finds_other_candidates(tiny_policy, reward, method):
    other = type(method)(**{**method.__dict__, "seed": 1})
    runs = [m.run(tiny_policy, reward, PROMPTS[:1]) for m in (method, other)]
    assert not {r["seed"] for r in runs[0].lineage} & {r["seed"] for r in runs[1].lineage}


class TestRandomSearch:
    def test_rounds_double_and_nest(self, tiny_policy, reward):
        few, many = (
            RandomSearch(rounds=r, **FAST).run(tiny_policy, reward, PROMPTS) for r in (2, 3)
        )
        assert len(few.candidates) == 2 * (2 + 4) and len(many.candidates) == 2 * 14
        for prompt in (0, 1):
            seeds = [[r.lineage[i]["seed"] for i in by_prompt(r, prompt)] for r in (few, many)]
            assert seeds[1][:6] == seeds[0]
        assert (many.scores.value >= few.scores.value - 1e-6).all()
        assert many.nfe == 28 * 2 and many.reward_calls == many.spent.decodes == 28

    def test_a_prompt_at_its_target_takes_no_further_round(self, tiny_policy, reward):
        free = RandomSearch(rounds=3, **FAST).run(tiny_policy, reward, PROMPTS)
        first = [t["best"] for t in free.trace if t["round"] == 0]
        target = (first[0] + first[1]) / 2
        ahead = int(first[1] > first[0])
        ended = RandomSearch(rounds=3, target=target, **FAST).run(tiny_policy, reward, PROMPTS)
        assert len(by_prompt(ended, ahead)) == 2 and len(by_prompt(ended, 1 - ahead)) > 2
        assert ended.scores.value[ahead] >= target

    def test_budgets(self, tiny_policy, reward):
        result = RandomSearch(rounds=4, **FAST).run(
            tiny_policy, reward, PROMPTS, budget={"nfe": 11}
        )
        assert result.nfe == 20 and len(by_prompt(result, 0)) == len(by_prompt(result, 1)) == 5
        hurried = RandomSearch(rounds=6, batch_size=2, **FAST).run(
            tiny_policy, reward, PROMPTS, budget={"seconds": 1e-6}
        )
        assert len(hurried.candidates) == 2
        with pytest.raises(BudgetError, match="random_search"):
            RandomSearch(**FAST).run(tiny_policy, reward, PROMPTS, budget={"nfe": 1})


class TestZeroOrder:
    def test_accepted_scores_only_rise(self, tiny_policy, reward):
        result = ZeroOrder(iterations=5, neighbours=3, cosine=0.8, **FAST).run(
            tiny_policy, reward, PROMPTS
        )
        for prompt in (0, 1):
            walk = [t for t in result.trace if t["prompt"] == prompt]
            assert [t["iteration"] for t in walk] == list(range(6))
            for before, after in pairwise(walk):
                best = max(after["values"])
                assert after["moved"] is (best > before["best"])
                assert after["best"] == max(best, before["best"])
            assert walk[-1]["best"] == float(result.scores.value[prompt])
            assert sum(t["moved"] for t in walk[1:]) > 0

    def test_the_winner_is_made_again_from_its_lineage(self, tiny_policy, reward):
        method = ZeroOrder(iterations=5, neighbours=3, cosine=0.8, **FAST)
        result = method.run(tiny_policy, reward, PROMPTS)
        for prompt, row in enumerate(result.chosen):
            noise = noise_of(tiny_policy, result.lineage, row, method.cosine)
            given = tiny_policy.encode([PROMPTS[prompt]])
            latents = integrate(tiny_policy, noise, tiny_policy.sigmas(2), given, 1.0)
            picture = tiny_policy.decode(latents).data
            torch.testing.assert_close(picture[0], result.media.data[prompt], rtol=1e-4, atol=1e-5)
        root = noise_of(tiny_policy, result.lineage, by_prompt(result, 0)[0], method.cosine)
        assert math.isclose(float(root.norm()), root.numel() ** 0.5, rel_tol=0.15)  # 3 deviations

    def test_without_iterations_it_is_best_of_its_start(self, tiny_policy, reward):
        result = ZeroOrder(iterations=0, start=3, **FAST).run(tiny_policy, reward, PROMPTS)
        values = result.candidate_scores.value.reshape(2, 3)
        assert result.scores.value.tolist() == values.max(1).values.tolist()

    def test_unscored_pictures_are_no_pivots(self, tiny_policy):
        def picky(images, prompts):
            picky.calls += 1
            return [math.nan if picky.calls == 1 else float(picky.calls) for _ in images]

        picky.calls = 0
        result = ZeroOrder(iterations=3, neighbours=1, **FAST).run(
            tiny_policy, FunctionReward(picky), PROMPTS[:1]
        )
        assert [t["moved"] for t in result.trace] == [False, True, True, True]
        assert result.lineage[0]["rank"] is None and result.scores.value.tolist() == [4.0]

    def test_budgets(self, tiny_policy, reward):
        method = ZeroOrder(iterations=9, neighbours=4, **FAST)
        result = method.run(tiny_policy, reward, PROMPTS, budget="reward_calls=8")
        assert result.reward_calls == 16 and max(t["iteration"] for t in result.trace) == 2
        hurried = method.run(tiny_policy, reward, PROMPTS, budget={"seconds": 1e-6})
        assert len(hurried.candidates) == 2


class TestPathSearch:
    def test_one_branch_of_one_trajectory_is_the_stochastic_sampler(self, tiny_policy, reward):
        options = {"width": 1, "branch": 1, "every": 1, "steps": 4, "guidance_scale": 1.0}
        result = PathSearch(**options).run(tiny_policy, reward, PROMPTS[:1])
        assert result.nfe == 4 and [t["step"] for t in result.trace] == [2, 3]
        assert all(t["parents"] == t["kept"] == [0] for t in result.trace)

    def test_without_branching_it_is_best_of_its_width(self, tiny_policy, reward):
        result = PathSearch(width=3, start=0.5, stop=0.5, **FAST).run(tiny_policy, reward, PROMPTS)
        assert not result.trace and len(result.candidates) == 6
        seeds = [line["seed"] for line in result.lineage]
        plain, nfe = generate(tiny_policy, [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3, seeds, **FAST)
        torch.testing.assert_close(result.candidates.data, plain.data, rtol=1e-4, atol=1e-5)
        assert result.nfe == nfe

    def test_the_best_branches_go_on(self, tiny_policy, reward):
        result = METHODS[2].run(tiny_policy, reward, PROMPTS)
        assert [t["step"] for t in result.trace if t["prompt"] == 0] == [2, 3]
        for visit in result.trace:
            ranked = sorted(visit["values"], reverse=True)
            assert [visit["values"][i] for i in visit["kept"]] == ranked[:2]
            assert visit["parents"] == [0, 0, 0, 1, 1, 1] and visit["steps"] == 4
        # 2 trajectories of 4 steps, and at 2 visits 6 states of which 2 are gone on with.
        assert result.nfe == 2 * (2 * 4 + 2 * (6 - 2))
        assert result.reward_calls == 2 * (2 * 6 + 2)

    def test_unscored_branches_die_with_a_note(self, tiny_policy):
        def picky(images, prompts):
            return [math.nan if i % 3 else float(i) for i in range(len(images))]

        result = PathSearch(width=1, branch=3, every=1, steps=4, guidance_scale=1.0).run(
            tiny_policy, FunctionReward(picky), PROMPTS[:1]
        )
        assert result.trace[0]["values"] == [0.0, None, None]
        assert result.trace[0]["note"] == "2 of 3 branches could not be scored"

    def test_budgets(self, tiny_policy, reward):
        method = METHODS[2]
        for limit in (4, 9, 13, 16, 100):
            result = method.run(tiny_policy, reward, PROMPTS, budget={"nfe": limit})
            assert result.nfe <= 2 * limit, limit
        hurried = method.run(tiny_policy, reward, PROMPTS, budget={"seconds": 1e-6})
        assert len(hurried.candidates) == 2 and not hurried.trace
        with pytest.raises(BudgetError, match="one trajectory"):
            method.run(tiny_policy, reward, PROMPTS, budget={"nfe": 3})

    def test_kernels(self, tiny_policy, reward):
        flow = PathSearch(kernel="flow_sde", kernel_options={"noise_level": 0.5}, steps=3)
        assert len(flow.run(tiny_policy, reward, PROMPTS[:1]).candidates) == 2
        for name, said in (("ode", "deterministic"), ("ddim", "made for epsilon")):
            with pytest.raises(ValueError, match=said):
                PathSearch(kernel=name).run(tiny_policy, reward, PROMPTS)
        diffusion = load_policy("tiny-sd")
        result = PathSearch(steps=4, every=1).run(diffusion, reward, PROMPTS[:1])
        assert len(result.trace) == 2 and torch.isfinite(result.scores.value).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RandomSearch(rounds=0), "random_search: rounds must be a whole number from 1"),
        (lambda: ZeroOrder(cosine=1.0), "cosine must lie in"),
        (lambda: ZeroOrder(neighbours=0), "neighbours"),
        (lambda: PathSearch(start=0.9), "0 <= start <= stop <= 1"),
        (lambda: PathSearch(batch_size=True), "batch_size"),
    ],
)
def test_bad_options_are_explained(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_they_are_registered():
    assert STEERERS.load("random_search") is RandomSearch
    assert STEERERS.load("zero_order") is ZeroOrder
    assert STEERERS.load("path_search") is PathSearch


def test_search_helps_on_the_shapes_world(flow):
    """Within one budget, on the reward searched with and on the exact verifier."""
    prompts = ["a photo of three green squares", "a photo of a yellow triangle above a red square"]
    reward, judge = load_reward("shapes_partial"), load_reward("shapes_strict")
    budget = {"nfe": 6 * 8 * 2}
    plain = BestOfN(n=6, steps=8).run(flow, reward, prompts, budget=budget)
    results = {
        "one picture": (plain.candidate_scores.value.mean(), plain.candidates, plain.nfe / 6),
    }
    for method in (
        RandomSearch(rounds=2, steps=8),
        ZeroOrder(neighbours=2, iterations=2, start=2, cosine=0.8, steps=8),
        PathSearch(width=2, branch=3, steps=8),
    ):
        found = method.run(flow, reward, prompts, budget=budget)
        results[method.method] = found.scores.value.mean(), found.media, found.nfe
        assert found.nfe <= 2 * budget["nfe"]
    for name, (value, media, nfe) in results.items():
        texts = [p for p in prompts for _ in range(len(media) // 2)]
        strict = float(judge.score(media, texts).value.mean())
        print(f"{name}: shapes_partial {float(value):.3f}, shapes_strict {strict:.2f}, {nfe:g} nfe")
    bare, *searched = (value for value, _, _ in results.values())
    assert all(value > bare + 0.02 for value in searched)
