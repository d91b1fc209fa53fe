"""FK steering of stock pipelines' own calls, and its agreement with the own loop."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)

from mmalign.policies.build import tiny_pipeline
from mmalign.policies.load import load_policy
from mmalign.policies.tiny import tiny_flux, tiny_sd, tiny_sdxl, tiny_wan
from mmalign.steering.budget import BudgetError
from mmalign.steering.fk import Fk
from mmalign.steering.pipelines import steer_pipeline
from vision_rewards.function import FunctionReward

PROMPTS = ["a photo of a red star", "a photo of two circles"]
CALL = {"num_inference_steps": 5, "guidance_scale": 3.0}
WAN = {**CALL, "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
STEERING = {"k": 3, "strength": 300.0, "threshold": None, "seed": 4}


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Mean red of pictures or videos."""
    return images[..., 0, :, :].flatten(1).mean(1)


@pytest.fixture
def reward():
    return FunctionReward(red, takes="tensor", media=("image", "video"))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sd3():
    return quiet(tiny_pipeline())


def events(result):
    names = ("prompt", "step", "resampled", "ancestors")
    return [[t[n] for n in names] for t in result.trace if t["event"] == "visit"]


# -- the same particles as the own loop --------------------------------------------------------


@pytest.mark.parametrize("estimate", ["new", "lagged"])
@pytest.mark.parametrize("potential", ["difference", "max"])
def test_both_loops_give_the_same_particles(sd3, reward, estimate, potential):
    options = {**STEERING, "estimate": estimate, "potential": potential}
    method = Fk(**options, steps=5, guidance_scale=3.0)
    from mmalign.policies.sd3 import SD3Policy

    own = method.run(SD3Policy(sd3, max_sequence_length=0), reward, PROMPTS)
    stock = steer_pipeline(
        sd3, PROMPTS, reward=reward, method=Fk(**options), max_sequence_length=0, **CALL
    )
    assert sorted(events(stock)) == sorted(events(own)) and stock.chosen == own.chosen
    assert any(e[3] != [0, 1, 2] for e in events(own))
    torch.testing.assert_close(stock.candidates.data, own.candidates.data, rtol=1e-4, atol=1e-4)
    for a, b in zip(stock.lineage, own.lineage, strict=True):
        assert (a["seed"], a["ancestors"]) == (b["seed"], b["ancestors"])
        assert a["weight"] == pytest.approx(b["weight"], abs=1e-2)
    assert stock.nfe == own.nfe == 2 * 3 * 5 * 2 and stock.reward_calls == own.reward_calls


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_flux])
def test_the_other_families_agree_too(make, reward):
    pipe = quiet(make())
    method = Fk(**STEERING, steps=5, guidance_scale=3.0, start=1, stop=1)
    flux = make is tiny_flux
    own = method.run(load_policy(pipe), reward, PROMPTS)
    more = {"max_sequence_length": 512} if flux else {}
    stock = steer_pipeline(pipe, PROMPTS, reward=reward, method=method, **CALL, **more)
    assert stock.nfe == own.nfe and len(stock.candidates) == len(own.candidates) == 6
    if flux:  # noise is drawn in packed order there, so only the law is the same
        assert stock.candidates.data.shape == own.candidates.data.shape
    else:
        assert sorted(events(stock)) == sorted(events(own))
        torch.testing.assert_close(stock.candidates.data, own.candidates.data, rtol=1e-3, atol=1e-3)


# -- what only the stock loop has --------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_videos_through_unipc_and_euler(reward, scheduler):
    from diffusers import FlowMatchEulerDiscreteScheduler

    own = FlowMatchEulerDiscreteScheduler(shift=3.0) if scheduler == "euler" else None
    pipe = quiet(tiny_wan(scheduler=own))
    method = Fk(**{**STEERING, "strength": 1e6})  # the random decoder hardly varies
    result = steer_pipeline(pipe, PROMPTS, reward=reward, method=method, **WAN)
    assert result.candidates.data.shape == (6, 5, 3, 32, 32)
    assert result.nfe == 6 * 5 * 2 and len(events(result)) == 2 * 4
    plain = steer_pipeline(
        pipe, PROMPTS, reward=reward, method=Fk(**{**STEERING, "strength": 0.0}), **WAN
    )
    assert result.candidate_scores.value.mean() > plain.candidate_scores.value.mean()


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_any_solver_will_do(reward, kind):
    pipe = quiet(tiny_sd())
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    given = pipe.scheduler
    result = steer_pipeline(pipe, PROMPTS[0], reward=reward, method=Fk(**STEERING), **CALL)
    assert pipe.scheduler is given and len(result.candidates) == 3
    assert torch.isfinite(result.candidates.data).all()


def test_a_pipelines_own_noise(reward):
    pipe = quiet(tiny_sd())
    method = Fk(**STEERING)
    with pytest.raises(ValueError, match="DDIMScheduler adds no noise here"):
        steer_pipeline(pipe, PROMPTS, reward=reward, method=method, native=True, **CALL)
    by_eta = steer_pipeline(
        pipe, PROMPTS, reward=reward, method=method, native=True, eta=1.0, **CALL
    )
    assert any(e[3] != [0, 1, 2] for e in events(by_eta))
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    result = steer_pipeline(pipe, PROMPTS, reward=reward, method=method, native=True, **CALL)
    apart = torch.pdist(result.candidates.data[:3].flatten(1))
    assert apart.min() > 1e-4
    # Unvisited, the particles are the pipeline's own pictures.
    seeds = [line["seed"] for line in result.lineage]
    plain = steer_pipeline(
        pipe, PROMPTS[0], reward=reward, method=Fk(**{**STEERING, "strength": 0.0}), native=True,
        **CALL,
    )  # fmt: skip
    rows = [torch.Generator().manual_seed(line["seed"]) for line in plain.lineage]
    own = pipe(PROMPTS[0], num_images_per_prompt=3, generator=rows, output_type="pt", **CALL)
    torch.testing.assert_close(plain.candidates.data, own.images, rtol=1e-4, atol=1e-4)
    assert {line["seed"] for line in plain.lineage} >= set(seeds[:3])


def test_without_strength_and_kernel_the_pictures_are_the_pipelines_own(sd3, reward):
    call = {**CALL, "max_sequence_length": 0}
    result = steer_pipeline(
        sd3, PROMPTS, reward=reward, method=Fk(k=2, strength=0.0), native=True, **call
    )
    rows = [torch.Generator().manual_seed(line["seed"]) for line in result.lineage]
    own = sd3(PROMPTS, num_images_per_prompt=2, generator=rows, output_type="pt", **call)
    torch.testing.assert_close(result.candidates.data, own.images, rtol=1e-5, atol=1e-5)
    assert result.reward_calls == 4


def test_prompts_in_several_calls_are_the_same(sd3, reward):
    method = Fk(**STEERING)
    call = {**CALL, "max_sequence_length": 0}
    seen = []
    whole = steer_pipeline(sd3, PROMPTS, reward=reward, method=method, **call)
    parts = steer_pipeline(
        sd3, PROMPTS, reward=reward, method=Fk(**STEERING, batch_size=3), watch=seen.append,
        negative_prompt=["", ""], **call,
    )  # fmt: skip
    torch.testing.assert_close(whole.candidates.data, parts.candidates.data, rtol=1e-4, atol=1e-4)
    assert sorted(events(whole)) == sorted(events(parts)) and whole.chosen == parts.chosen
    assert [s.done for s in seen] == list(range(1, 11)) and seen[-1].total == 10
    assert torch.isfinite(seen[-1].best).all() and torch.isnan(seen[0].best).tolist() == [0, 1]


def test_budgets(sd3, reward):
    call = {**CALL, "max_sequence_length": 0, "reward": reward}
    result = steer_pipeline(sd3, PROMPTS, method=Fk(**STEERING), budget="nfe=25", **call)
    assert len(result.candidates) == 4 and result.nfe == 40
    with pytest.raises(BudgetError, match="one particle"):
        steer_pipeline(sd3, PROMPTS, budget="nfe=9", **call)
    few = steer_pipeline(sd3, PROMPTS, k=3, budget={"seconds": 1e-6}, **call)
    assert not events(few) and len(few.candidates) == 6


# -- what cannot work --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"generator": None}, "generator is set by steering itself.*use seed"),
        ({"num_images_per_prompt": 2}, "use k"),
        ({"guidance": 3.0}, "takes no option 'guidance'"),
        ({"negative_prompt": ["a"]}, "negative_prompt has 1 entries for 2 prompts"),
        ({"method": "reno"}, "method 'reno' does not work between the steps"),
        ({"method": Fk(kernel="ddim")}, "kernels that fit: .*cps"),
    ],
)
def test_wrong_calls_stop_before_the_network(sd3, reward, monkeypatch, options, said):
    monkeypatch.setattr(sd3.transformer, "forward", pytest.fail)
    with pytest.raises(ValueError, match=said):
        steer_pipeline(sd3, PROMPTS, reward=reward, **options)


def test_unknown_schedulers_and_media_are_refused(reward):
    pipe = quiet(tiny_sd())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="odd")
    with pytest.raises(ValueError, match="prediction_type 'odd' cannot be steered"):
        steer_pipeline(pipe, PROMPTS, reward=reward)
    images_only = FunctionReward(red, takes="tensor")
    with pytest.raises(ValueError, match="makes video"):
        steer_pipeline(quiet(tiny_wan()), PROMPTS, reward=images_only, **WAN)


def test_feature_caches_are_refused(reward):
    from diffusers import FasterCacheConfig

    pipe = quiet(tiny_wan())
    pipe.transformer.enable_cache(
        FasterCacheConfig(current_timestep_callback=lambda: pipe.current_timestep)
    )
    with pytest.raises(ValueError, match=r"Turn it off with disable_cache"):
        steer_pipeline(pipe, PROMPTS, reward=reward, **WAN)
    pipe.transformer.disable_cache()
    assert len(steer_pipeline(pipe, PROMPTS, reward=reward, k=1, **WAN).candidates) == 2
