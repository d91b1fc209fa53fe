"""Best of N: what is chosen, what it costs, what cannot be chosen."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mmalign.protocols import RewardInfo, Steerer
from mmalign.registry import STEERERS
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling import generate
from mmalign.steering import BestOfN
from vision_rewards.function import FunctionReward

PROMPTS = ["a photo of a red star", "a photo of two circles"]


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Mean red."""
    return images[:, 0].mean((1, 2))


@pytest.fixture
def reward():
    return FunctionReward(brightness, takes="tensor")


def method(**options) -> BestOfN:
    return BestOfN(**{"n": 3, "steps": 2, "guidance_scale": 1.0, **options})


def test_the_best_candidate_is_chosen(tiny_policy, reward):
    result = method().run(tiny_policy, reward, PROMPTS)
    values = result.candidate_scores.value.reshape(2, 3)
    assert result.scores.value.tolist() == values.max(1).values.tolist()
    assert result.chosen == (int(values[0].argmax()), 3 + int(values[1].argmax()))
    assert result.media.data.equal(result.candidates.data[list(result.chosen)])
    assert result.prompts == tuple(PROMPTS) and len(result.candidates) == 6
    assert result.nfe == 6 * 2 and result.reward_calls == 6
    assert [line["prompt"] for line in result.lineage] == [0, 0, 0, 1, 1, 1]
    for prompt in (0, 1):
        assert sorted(r["rank"] for r in result.lineage if r["prompt"] == prompt) == [1, 2, 3]
    assert all(result.lineage[i]["rank"] == 1 for i in result.chosen)


def test_candidates_are_made_of_their_seeds(tiny_policy, reward):
    result = method(seed=5).run(tiny_policy, reward, PROMPTS)
    assert result.lineage[4]["seed"] == stable_seed("steering", 5, PROMPTS[1], 1)
    seeds = [result.lineage[4]["seed"]]
    alone, _ = generate(tiny_policy, PROMPTS[1:], seeds, steps=2, guidance_scale=1.0)
    torch.testing.assert_close(result.candidates.data[4:5], alone.data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_batch_size_changes_nothing(tiny_policy, reward, size):
    whole, parts = (method(batch_size=s).run(tiny_policy, reward, PROMPTS) for s in (6, size))
    assert whole.chosen == parts.chosen and whole.nfe == parts.nfe
    torch.testing.assert_close(whole.candidates.data, parts.candidates.data, rtol=1e-4, atol=1e-5)


def test_more_candidates_never_lower_the_score(tiny_policy, reward):
    scores = [method(n=n).run(tiny_policy, reward, PROMPTS).scores.value for n in (1, 2, 4, 8)]
    for fewer, more in pairwise(scores):
        assert (more >= fewer - 1e-5).all()
    assert scores[-1].sum() > scores[0].sum()


def test_policys_own_sampler_and_precision(tiny_policy, reward):
    result = BestOfN(n=1, guidance_scale=2.0, dtype="bf16").run(tiny_policy, reward, PROMPTS[:1])
    assert result.nfe == 2 * tiny_policy.sampler.steps


def test_ties_go_to_the_earlier_candidate(tiny_policy):
    constant = FunctionReward(lambda images, prompts: [1.0] * len(images))
    assert method().run(tiny_policy, constant, PROMPTS).chosen == (0, 3)


def test_unscored_candidates_are_kept_and_never_chosen(tiny_policy, reward):
    def picky(images, prompts):
        return [math.nan if i % 3 == 0 else -1.0 - i for i in range(len(images))]

    result = method().run(tiny_policy, FunctionReward(picky), PROMPTS)
    assert result.chosen == (1, 4) and len(result.candidates) == 6
    assert result.lineage[0]["rank"] is None and result.lineage[2]["rank"] == 2
    assert result.scores.valid.all()
    assert result.candidate_scores.valid.tolist() == [False, True, True] * 2


def test_a_prompt_without_any_score_is_named(tiny_policy):
    calls: list[str] = []

    def blind(images, prompts):
        calls.extend(prompts)
        return [None if p == PROMPTS[1] else 0.0 for p in prompts]

    three = [*PROMPTS, "a photo of a cross"]
    with pytest.raises(ValueError, match="could score none of the 3 candidates") as info:
        method(batch_size=3).run(tiny_policy, FunctionReward(blind), three)
    assert repr(PROMPTS[1]) in str(info.value) and "no finite number" in str(info.value)
    assert three[2] not in calls  # stops as soon as it is known


def info(**changes):
    return replace(RewardInfo(name="odd"), **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"media": ("video",)}, "judges video; tiny makes image"),
        ({"scope": "pairwise"}, "judges a pairwise"),
        ({"needs": ("prompt", "reference image")}, "needs reference image"),
    ],
)
def test_unfit_rewards_are_refused_before_the_network(
    tiny_policy, reward, monkeypatch, changes, said
):
    monkeypatch.setattr(tiny_policy, "predict", pytest.fail)
    reward.info = info(**changes)
    with pytest.raises(ValueError, match=said):
        method().run(tiny_policy, reward, PROMPTS)


def test_bad_prompts_are_refused_before_the_network(tiny_policy, reward, monkeypatch):
    monkeypatch.setattr(tiny_policy, "predict", pytest.fail)
    for prompts in ([], "a photo of a star"):
        with pytest.raises(ValueError, match="non-empty list of prompts"):
            method().run(tiny_policy, reward, prompts)
    with pytest.raises(ValueError, match="tokens"):
        method(n=1, batch_size=1).run(tiny_policy, reward, [*PROMPTS, "star " * 40])


@pytest.mark.parametrize("options", [{"n": 0}, {"n": 1.5}, {"batch_size": 0}, {"steps": 0}])
def test_bad_options_are_explained(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a whole number from 1"):
        BestOfN(**options)


def test_it_is_registered():
    assert STEERERS.load("best_of_n") is BestOfN and isinstance(BestOfN(), Steerer)
