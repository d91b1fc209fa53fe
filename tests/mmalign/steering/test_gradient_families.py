"""Gradient methods on every family of pipelines, what their networks predict, and guidance."""

from __future__ import annotations

import pytest
import torch
from redness import redness

from mmalign.policies.flux import FluxPolicy
from mmalign.policies.sd import SDPolicy
from mmalign.policies.sdxl import SDXLPolicy
from mmalign.policies.tiny import tiny_flux, tiny_sd, tiny_sdxl
from mmalign.steering import build_steerer
from vision_rewards.function import FunctionReward

PROMPTS = ["a photo of a red star", "a photo of two circles"]
METHODS = {
    "reno": {"iterations": 3, "clip": 1.0},
    "dno": {"iterations": 3, "rate": 0.05, "penalty": 0.0},
    "das": {"k": 2, "strength": 50.0},
    "reward_guidance": {"strength": 0.5},
}


def make(family: str):
    """A tiny policy and its guidance."""
    if family == "flux":
        return FluxPolicy(tiny_flux(), max_sequence_length=40), 1.0
    if family == "sdxl":
        return SDXLPolicy(tiny_sdxl()), 3.0
    kind = "v_prediction" if family == "sd-v" else "epsilon"
    return SDPolicy(tiny_sd(prediction_type=kind)), 3.0


@pytest.fixture(scope="module", params=["sd", "sd-v", "sdxl", "flux"])
def made(request):
    policy, scale = make(request.param)
    policy.pipeline.set_progress_bar_config(disable=True)
    return policy, scale


@pytest.mark.parametrize("name", METHODS)
def test_it_raises_the_reward(made, name):
    policy, scale = made
    reward = FunctionReward(redness, takes="tensor", differentiable=True)
    options = {"steps": 3, "guidance_scale": scale, **METHODS[name]}
    result = build_steerer(name, 0, options).run(policy, reward, PROMPTS)
    assert torch.isfinite(result.media.data).all()
    if name in ("reno", "dno"):
        assert all(result.lineage[i]["iteration"] > 0 for i in result.chosen)
    else:
        plain = build_steerer(name, 0, {**options, "strength": 0.0}).run(policy, reward, PROMPTS)
        assert result.candidate_scores.value.mean() > plain.candidate_scores.value.mean()
