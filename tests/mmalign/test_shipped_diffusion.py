"""The shipped epsilon generator: a stock pipeline that draws, and the policy over it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from mmalign.assets import asset
from mmalign.policies.load import load_policy
from mmalign.sampling import DdimKernel, Plan, collect, generate, replay

PROMPTS = ["a photo of a red star", "a photo of two blue squares"]


def test_it_is_a_stock_pipeline_and_the_own_loop_repeats_it_bit_for_bit() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        str(asset("shapes-sd")),
        safety_checker=None,
        feature_extractor=None,
        torch_dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    # Loading by name keeps the decoder channels-last, which rounds differently; the rest is stock.
    pipeline.vae.to(memory_format=torch.channels_last)
    policy = load_policy("shapes-sd")
    assert policy.parameterisation == "epsilon"
    for scale in (1.0, 2.0):
        stock = pipeline(
            PROMPTS,
            num_inference_steps=5,
            guidance_scale=scale,
            generator=[torch.Generator().manual_seed(s) for s in (1, 2)],
            output_type="pt",
        ).images
        own, nfe = generate(policy, PROMPTS, [1, 2], steps=5, guidance_scale=scale)
        assert torch.equal(own.data, stock)
        assert nfe == (10 if scale == 1 else 20)


def test_trajectories_replay_with_a_ratio_of_one() -> None:
    policy = load_policy("shapes-sd")
    plan = Plan(kernel=DdimKernel(), steps=5, guidance_scale=2.0, record=(0, 2))
    rollout = collect(policy, PROMPTS, torch.tensor([0, 1]), [1, 2], plan)
    for i in range(2):
        step, _ = replay(policy, rollout, i, plan.kernel)
        assert (step.log_prob - rollout.log_probs[:, i]).abs().max() < 1e-6


def test_its_latents_are_those_the_stock_pipeline_decodes() -> None:
    """Stock Stable Diffusion knows no shift; the autoencoder must not ask for one."""
    config = json.loads((asset("shapes-sd") / "vae" / "config.json").read_text())
    assert config["shift_factor"] == 0.0
    assert config["scaling_factor"] == pytest.approx(1.0026)
