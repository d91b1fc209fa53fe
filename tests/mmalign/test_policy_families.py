"""SD, SDXL and FLUX policies against the stock pipelines they wrap."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)

from mmalign.policies.architectures import ARCHITECTURES
from mmalign.policies.flux import FluxPolicy
from mmalign.policies.load import load_policy
from mmalign.policies.random_init import build_random, load_random
from mmalign.policies.sd import SDPolicy
from mmalign.policies.sdxl import SDXLPolicy
from mmalign.policies.tiny import tiny_flux, tiny_sd, tiny_sdxl
from mmalign.protocols import Policy, Sampler
from mmalign.sampling import KernelMismatchError, Plan, build_kernel, collect, generate, replay
from mmalign.sampling.conditioning import ConditioningCache
from mmalign.types import Conditioning

PROMPTS = ["a photo of a red star", "a photo of two blue circles", "a photo of a pink cross"]
SEEDS = [3, 2**62 + 1, 5]
T5_TOKENS = 40
ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def make(family: str, **schedule):
    """A policy over a fresh pipeline."""
    if family.startswith("flux"):
        pipeline = tiny_flux(distilled=family == "flux")
        pipeline.set_progress_bar_config(disable=True)
        return FluxPolicy(pipeline, max_sequence_length=T5_TOKENS)
    kind = {"prediction_type": "v_prediction"} if family == "sd-v" else {}
    build, wrap = (tiny_sdxl, SDXLPolicy) if family == "sdxl" else (tiny_sd, SDPolicy)
    pipeline = build(**kind, **schedule)
    pipeline.set_progress_bar_config(disable=True)
    return wrap(pipeline)


FAMILIES = ("sd", "sd-v", "sdxl", "flux", "flux-schnell")
MADE = {}


@pytest.fixture(params=FAMILIES)
def policy(request):
    """One policy of each family, shared; tests leave it as it was."""
    if request.param not in MADE:
        MADE[request.param] = make(request.param)
    return MADE[request.param]


def stock(policy, guidance_scale: float, steps: int = 4, **options) -> torch.Tensor:
    """What the pipeline's own call makes of the same prompts and seeds."""
    if isinstance(policy, FluxPolicy):
        options["max_sequence_length"] = T5_TOKENS
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    return policy.pipeline(
        prompt=PROMPTS,
        generator=generators,
        output_type="pt",
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=policy.sampler.height,
        width=policy.sampler.width,
        **options,
    ).images


def ours(policy, guidance_scale: float, steps: int = 4) -> torch.Tensor:
    return generate(policy, PROMPTS, SEEDS, steps=steps, guidance_scale=guidance_scale)[0].data


# --- equal to the stock pipeline ------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_same_pictures_bit_for_bit(policy, guidance):
    if policy.sampler.guidance_scale == 1.0:
        guidance = 1.0  # schnell knows no guidance, which is tested below
    made = ours(policy, guidance)
    assert made.shape == (3, 3, 32, 32) and made.std() > 0.01
    assert made.equal(stock(policy, guidance))
    if guidance > 1:
        assert (made - ours(policy, 1.0)).abs().max() > 1e-5


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_another_shape(family):
    policy = make(family)
    policy.sampler = Sampler(steps=4, guidance_scale=3.0, height=16, width=24)
    assert policy.init_noise([0]).shape == (1, 4, 8, 12)
    assert ours(policy, 3.0).equal(stock(policy, 3.0))


@pytest.mark.parametrize(
    ("family", "schedule"),
    [
        ("sd", {"set_alpha_to_one": True, "steps_offset": 0}),
        ("sd", {"timestep_spacing": "trailing"}),
        ("sd", {"beta_schedule": "linear"}),
        ("sd", ZERO_SNR),
        ("sdxl", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ],
)
def test_schedules(family, schedule):
    policy = make(family, **schedule)
    assert ours(policy, 3.0).equal(stock(policy, 3.0))
    # The network does not depend on the schedule, so another one is another picture.
    assert not ours(policy, 3.0).equal(ours(make(family), 3.0))


@pytest.mark.parametrize("family", ["sd", "sd-v", "sdxl"])
def test_full_noise_is_the_stock_pipelines_for_the_same_draws(family):
    policy = make(family)
    kernel = build_kernel("ddim").bound(policy.parameterisation)
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]

    def draw() -> torch.Tensor:
        return torch.cat([torch.randn(1, *policy.latent_shape, generator=g) for g in generators])

    x, sigmas, conditioning = draw(), policy.sigmas(5), policy.encode(PROMPTS)
    with torch.no_grad():
        for k in range(5):
            out = policy.predict(x, sigmas[k], conditioning, 3.0)
            x = kernel.step(x, sigmas[k], sigmas[k + 1], out, draw()).x_next
        made = policy.decode(x).data
    assert made.equal(stock(policy, 3.0, steps=5, eta=1.0))


def test_schnell_shifts_by_a_constant():
    policy = make("flux-schnell")
    assert torch.allclose(policy.sigmas(4), torch.linspace(1, 0, 5))
    assert not torch.allclose(make("flux").sigmas(4), torch.linspace(1, 0, 5), atol=0.05)


def test_empty_prompts_are_zeros_where_the_pipeline_says_so():
    policy = make("sdxl")
    negative = policy.encode(PROMPTS[:1]).negative
    assert not negative["embeds"].any() and not negative["pooled"].any()
    policy.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert policy.encode(PROMPTS[:1]).negative["embeds"].any()
    assert ours(policy, 3.0).equal(stock(policy, 3.0))


# --- noise levels and times -----------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_levels_stand_for_the_schedulers_times(spacing, steps):
    policy = make("sd", timestep_spacing=spacing)
    scheduler, sigmas = policy.pipeline.scheduler, policy.sigmas(steps)
    scheduler.set_timesteps(steps)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (steps + 1,)
    assert (sigmas.diff() <= 0).all() and sigmas[0] < 1
    assert policy.times(sigmas[:-1]).equal(scheduler.timesteps)
    assert policy.times(sigmas[:-1].float()).equal(scheduler.timesteps)  # a rounded level will do
    assert sigmas[-1] == (1 - scheduler.final_alpha_cumprod.double()).sqrt()


def test_all_times_can_be_told_apart():
    for schedule in ({}, ZERO_SNR):
        policy = make("sd", **schedule)
        assert policy.times(policy.levels).equal(torch.arange(1000))
        assert policy.times(torch.tensor(0.0)) == 0


def test_too_many_steps():
    policy = make("sd")
    assert len(policy.sigmas(999)) == 1000
    for steps in (0, 1000):
        with pytest.raises(ValueError, match=rf"steps is {steps}; .* 1\.\.999"):
            policy.sigmas(steps)


# --- parts ----------------------------------------------------------------------------------------


def test_protocol(policy):
    assert isinstance(policy, Policy) and policy.media == "image"
    expected = {"SDPolicy": "sd", "SDXLPolicy": "sdxl", "FluxPolicy": "flux"}
    assert policy.family == expected[type(policy).__name__]
    assert policy.denoiser in policy.pipeline.components.values()
    assert policy.sampler.height == policy.sampler.width == 32


def test_noise_depends_on_the_seed_alone(policy):
    noise = policy.init_noise([5, 6, 5])
    assert noise.shape == (3, *policy.latent_shape) and noise.dtype == torch.float32
    assert noise[0].equal(noise[2]) and not noise[0].equal(noise[1])
    assert noise[1:2].equal(policy.init_noise([6]))


def test_level_may_differ_by_row(policy):
    x, conditioning = policy.init_noise([1, 2]), policy.encode(PROMPTS[:2])
    with torch.no_grad():
        whole = policy.predict(x, torch.tensor([0.9, 0.3]), conditioning, 1.0)
        second = policy.predict(x[1:], torch.tensor(0.3), conditioning[1:], 1.0)
    assert whole.shape == x.shape
    torch.testing.assert_close(whole[1:], second, rtol=1e-4, atol=1e-5)


def test_decoding_is_differentiable(policy):
    latents = policy.init_noise([1]).requires_grad_()
    media = policy.decode(latents)
    assert media.data.shape == (1, 3, 32, 32) and 0 <= media.data.min() <= media.data.max() <= 1
    media.data.mean().backward()
    assert latents.grad.abs().max() > 0


def test_prompts_are_encoded_once_and_alone(policy, monkeypatch):
    asked: list[str] = []
    encode = policy.encode
    monkeypatch.setattr(policy, "encode", lambda p: (asked.extend(p), encode(p))[1])
    cached = ConditioningCache(policy)([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert asked == PROMPTS[:2]
    together = encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    for name, value in together.positive.items():
        torch.testing.assert_close(cached.positive[name], value, rtol=1e-4, atol=1e-5)
    assert (cached.negative is None) == (together.negative is None)


def test_too_long_a_prompt_is_named(policy):
    long = "a photo of " + " ".join(["a red star and"] * 4)
    with pytest.raises(ValueError, match=r"has \d+ tokens .* takes (16|40) ") as info:
        policy.encode([PROMPTS[0], long])
    assert repr(long) in str(info.value)


def test_weights_in_bfloat16():
    for family in ("sd", "sdxl", "flux"):
        policy = load_policy(make(family).pipeline, dtype=torch.bfloat16)
        x, conditioning = policy.init_noise([1]), policy.encode(PROMPTS[:1])
        with torch.no_grad():
            out = policy.predict(x, policy.sigmas(4)[1], conditioning, 3.0)
        assert x.dtype == out.dtype == policy.decode(x).data.dtype == torch.float32
        assert policy.denoiser.dtype == torch.bfloat16


def test_half_precision_decoder_of_sdxl_works_in_fp32_and_stays_what_it_was():
    policy = make("sdxl")
    latents = policy.init_noise([1])
    wanted = policy.decode(latents).data
    policy.pipeline.vae.half()
    got = latents.clone().requires_grad_()
    pictures = policy.decode(got).data
    assert policy.pipeline.vae.dtype == torch.float16 and policy.decoder().dtype == torch.float32
    assert (pictures - wanted).abs().max() < 5e-3
    pictures.mean().backward()
    assert torch.isfinite(got.grad).all() and got.grad.any()


# --- guidance -------------------------------------------------------------------------------------


def test_flux_guidance_is_an_input_and_costs_nothing():
    policy = make("flux")
    assert policy.encode(PROMPTS).negative is None and policy.sampler.guidance_scale == 3.5
    media, nfe = generate(policy, PROMPTS, SEEDS, steps=4, guidance_scale=5.0)
    assert nfe == 3 * 4 and not media.data.equal(ours(policy, 1.0))


def test_guidance_without_a_branch_is_refused():
    schnell = make("flux-schnell")
    assert schnell.sampler.guidance_scale == 1.0
    with pytest.raises(ValueError, match=r"guidance_scale 3.5 is impossible .* Use guidance_scale"):
        ours(schnell, 3.5)
    for family in ("sd", "sdxl"):
        policy = make(family)
        bare = Conditioning(policy.encode(PROMPTS[:1]).positive)
        with pytest.raises(ValueError, match="needs an unconditional branch"):
            policy.predict(policy.init_noise([1]), torch.tensor(0.5), bare, 3.0)


# --- replay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ratio_is_one_on_replay(policy, guidance):
    flow = policy.parameterisation == "flow"
    guidance = min(guidance, policy.sampler.guidance_scale)  # 1 for schnell, which knows none
    recipe = Plan(
        kernel=build_kernel("flow_sde" if flow else "ddim"),
        steps=4,
        guidance_scale=guidance,
        record=(0, 1, 2),
    )
    rollout = collect(policy, PROMPTS, torch.arange(3), SEEDS, recipe)
    assert rollout.nfe == 3 * 4 * (2 if guidance > 1 and not flow else 1)
    assert rollout.log_probs.dtype == rollout.latents.dtype == torch.float32
    for i in range(3):
        step, _ = replay(policy, rollout, i, recipe.kernel)
        assert step.log_prob.requires_grad and step.log_prob.equal(rollout.log_probs[:, i])


def test_kernels_of_the_other_kind_are_refused_before_any_work(policy):
    flow = policy.parameterisation == "flow"
    kernel = build_kernel("ddim" if flow else "flow_sde")
    recipe = Plan(kernel=kernel, steps=4, guidance_scale=1.0, record=(0,))
    with pytest.raises(KernelMismatchError, match="flow_sde" if flow else "fit: .*ddim"):
        collect(policy, PROMPTS, torch.arange(3), SEEDS, recipe)


# --- what can be wrapped --------------------------------------------------------------------------


def test_wrong_schedulers_are_explained():
    for build, wrap in ((tiny_sd, SDPolicy), (tiny_sdxl, SDXLPolicy)):
        pipeline = build()
        pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
        with pytest.raises(ValueError, match=r"needs a DDIMScheduler, got PNDM.*from_config"):
            wrap(pipeline)
    for options, said in (
        ({"clip_sample": True}, "clip_sample on"),
        ({"thresholding": True}, "thresholding on"),
        ({"prediction_type": "sample"}, "got 'sample'"),
        ({"rescale_betas_zero_snr": True}, "pure noise"),
    ):
        pipeline = tiny_sd()  # its constructor would take clip_sample out of the scheduler
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **options)
        with pytest.raises(ValueError, match=said):
            SDPolicy(pipeline)
    pipeline = tiny_flux()
    pipeline.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="the flux policy needs a FlowMatchEuler"):
        FluxPolicy(pipeline)


def test_consistency_models_are_refused():
    pipeline = tiny_sd()
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="consistency"):
        SDPolicy(pipeline)


@pytest.mark.parametrize(
    "other", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_published_folders_are_sampled_with_ddim_on_their_schedule(other, tmp_path, capsys):
    pipeline = tiny_sd()
    wanted = ours(SDPolicy(copy.copy(pipeline)), 1.0)
    spacing = {"timestep_spacing": "leading"}  # where Euler's own default differs
    pipeline.scheduler = other.from_config(pipeline.scheduler.config, **spacing)
    pipeline.save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    assert type(policy.pipeline.scheduler) is DDIMScheduler
    assert f"DDIM in place of {other.__name__}" in "".join(capsys.readouterr())
    torch.testing.assert_close(ours(policy, 1.0), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_folder_round_trip(family, tmp_path):
    policy = make(family)
    made = ours(policy, 3.0)
    policy.pipeline.save_pretrained(tmp_path)
    again = load_policy(tmp_path)
    again.sampler, again.pipeline.vae = policy.sampler, policy.pipeline.vae
    if family == "flux":
        again.max_sequence_length = T5_TOKENS
    assert again.identity.split("@")[1] == policy.identity.split("@")[1]
    assert ours(again, 3.0).equal(made)


def test_tiny_pipelines_by_name():
    for name, kind in (("tiny-sd", SDPolicy), ("tiny-sdxl", SDXLPolicy), ("tiny-flux", FluxPolicy)):
        policy = load_policy(name)
        assert type(policy) is kind and policy.name == name


# --- published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("sd15", 859_520_964), ("sdxl", 2_567_463_684), ("flux-dev", 11_901_408_320)],
)
def test_random_architectures_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        pipeline = build_random(ARCHITECTURES[name])
    network = getattr(pipeline, ARCHITECTURES[name].component)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("name", ["sd-tiny", "sdxl-tiny", "flux-tiny"])
def test_random_architectures_draw(name):
    policy = load_random(f"random:{name}")
    policy.sampler = Sampler(steps=2, guidance_scale=2.0, height=16, width=16)
    media, nfe = generate(policy, PROMPTS, SEEDS)
    assert media.data.shape == (3, 3, 16, 16) and torch.isfinite(media.data).all()
    assert nfe == 3 * 2 * (1 if name == "flux-tiny" else 2)
    same, other = policy.encode(PROMPTS[:1]), policy.encode(PROMPTS[1:2])
    assert policy.encode(PROMPTS[:2])[:1].positive["embeds"].equal(same.positive["embeds"])
    assert not same.positive["embeds"].equal(other.positive["embeds"])
