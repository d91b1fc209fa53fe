"""Candidates have the same initial noise in every method, so methods are compared in pairs."""

from __future__ import annotations

import pytest
import torch

from mmalign.registry import STEERERS
from mmalign.sampling import generate
from mmalign.steering.engine import initial_seed
from vision_rewards.function import FunctionReward

PROMPTS = ["a photo of a red star", "a photo of two circles"]
FAST = {"steps": 2, "guidance_scale": 1.0}
METHODS = {
    "best_of_n": {"n": 3},
    "random_search": {"rounds": 1},
    "zero_order": {"start": 2, "iterations": 0},
    "path_search": {"width": 2, "start": 1.0, "stop": 1.0},  # no branching
    "fk": {"k": 2},
    "svdd": {"n": 2, "children": 1},
    "das": {"k": 2},
    "reward_guidance": {"n": 2},
    "reno": {"iterations": 1},
    "dno": {"iterations": 1},
    "refine": {"rounds": 0, "expand": lambda prompt: []},
}


def red(images, prompts):
    return images[:, 0].mean((1, 2))


@pytest.fixture
def reward():
    return FunctionReward(red, takes="tensor", differentiable=True)


def test_every_method_is_here():
    assert {entry.name for entry in STEERERS} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_first_candidates_have_the_same_seeds(tiny_policy, reward, name):
    found = STEERERS.load(name)(seed=5, **METHODS[name], **FAST).run(tiny_policy, reward, PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        seeds = {line["seed"] for line in found.lineage if line["prompt"] == number}
        allowed = [initial_seed(5, prompt, i) for i in range(3)]
        assert seeds <= set(allowed) and (name in ("fk", "das") or allowed[0] in seeds)


@pytest.mark.parametrize(
    "name", ["best_of_n", "random_search", "zero_order", "path_search", "reno"]
)
def test_unsteered_they_are_the_plain_picture(tiny_policy, reward, name):
    found = STEERERS.load(name)(**METHODS[name], **FAST).run(tiny_policy, reward, PROMPTS)
    plain, _ = generate(tiny_policy, PROMPTS, [initial_seed(0, p) for p in PROMPTS], **FAST)
    for number, prompt in enumerate(PROMPTS):
        rows = [i for i, line in enumerate(found.lineage)
                if (line["prompt"], line["seed"]) == (number, initial_seed(0, prompt))]  # fmt: skip
        torch.testing.assert_close(
            found.candidates.data[rows[0]], plain.data[number], rtol=1e-4, atol=1e-5
        )


def test_random_search_draws_the_noises_of_best_of_n(tiny_policy, reward):
    runs = [
        STEERERS.load(name)(**options, **FAST).run(tiny_policy, reward, PROMPTS)
        for name, options in (("random_search", {"rounds": 2}), ("best_of_n", {"n": 6}))
    ]
    assert [r["seed"] for r in runs[0].lineage] == [r["seed"] for r in runs[1].lineage]
    torch.testing.assert_close(*(r.scores.value for r in runs), rtol=1e-4, atol=1e-6)
