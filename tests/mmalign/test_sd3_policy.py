"""The SD3 policy against the stock pipeline it wraps."""

from __future__ import annotations

import json
import random

import pytest
import torch

from mmalign.policies.build import PROMPT_TOKENS, tiny_pipeline
from mmalign.policies.load import load_policy
from mmalign.policies.sd3 import SD3Policy
from mmalign.protocols import Policy, Sampler
from mmalign.registry import UnknownNameError
from mmalign.sampling import generate

PROMPTS = ["a photo of a red star", "a photo of two blue circles", "a photo of a pink cross"]
SEEDS = [3, 2**62 + 1, 5]


def stock(policy: SD3Policy, output_type: str = "pt", **options) -> torch.Tensor:
    """What the pipeline's own call makes of the same prompts and seeds."""
    pipeline = policy.pipeline
    pipeline.set_progress_bar_config(disable=True)
    settings = {
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "max_sequence_length": policy.max_sequence_length,
        "height": policy.sampler.height,
        "width": policy.sampler.width,
    }
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    return pipeline(
        prompt=PROMPTS, generator=generators, output_type=output_type, **{**settings, **options}
    ).images


def ours(policy: SD3Policy, guidance_scale: float = 3.0) -> torch.Tensor:
    media, nfe = generate(policy, PROMPTS, SEEDS, steps=4, guidance_scale=guidance_scale)
    assert nfe == 3 * 4 * (2 if guidance_scale > 1 else 1)
    return media.data


@pytest.fixture
def fresh():
    """A pipeline of its own, free to be changed."""
    return tiny_pipeline(seed=1)


# --- equal to the stock pipeline ----------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_same_pictures_bit_for_bit(tiny_policy, guidance):
    made = ours(tiny_policy, guidance)
    assert made.shape == (3, 3, 32, 32) and made.std() > 0.01
    assert made.equal(stock(tiny_policy, guidance_scale=guidance))


def test_zero_tokens_in_the_place_of_t5(fresh):
    default = SD3Policy(fresh)
    assert default.max_sequence_length == 256
    assert ours(default).equal(stock(default))
    assert default.encode(PROMPTS).positive["embeds"].shape[1] == PROMPT_TOKENS + 256


@pytest.mark.parametrize("shift", ["exponential", "linear"])
def test_dynamic_shifting(fresh, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    fresh.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, time_shift_type=shift
    )
    policy = SD3Policy(fresh, max_sequence_length=0)
    uniform = torch.linspace(1, 0, 5)
    assert not torch.allclose(policy.sigmas(4), uniform, atol=0.02)
    assert ours(policy).equal(stock(policy))


def test_shifted_schedule(fresh):
    from diffusers import FlowMatchEulerDiscreteScheduler

    fresh.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    policy = SD3Policy(fresh, max_sequence_length=0)
    assert ours(policy).equal(stock(policy))
    sigmas = policy.sigmas(4)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_with_t5(fresh):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    width = fresh.transformer.config.joint_attention_dim
    config = T5Config(
        vocab_size=128, d_model=width, d_ff=16, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    torch.manual_seed(0)
    letters = [(f"▁{c}", -2.0) for c in "apohtfredsu"] + [(c, -3.0) for c in "apohtfredsu"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    tokenizer = T5Tokenizer(vocab=[*special, *letters], extra_ids=0)
    fresh.register_modules(text_encoder_3=T5EncoderModel(config).eval(), tokenizer_3=tokenizer)
    policy = SD3Policy(fresh, max_sequence_length=24)
    embeds = policy.encode(PROMPTS).positive["embeds"]
    assert embeds.shape[1] == PROMPT_TOKENS + 24 and embeds[:, PROMPT_TOKENS:].abs().min() > 0
    assert ours(policy).equal(stock(policy))


def test_other_size(fresh):
    policy = SD3Policy(fresh, max_sequence_length=0)
    policy.sampler = Sampler(steps=4, guidance_scale=3.0, height=16, width=24)
    assert policy.init_noise([0]).shape == (1, 4, 4, 6)
    assert ours(policy).equal(stock(policy))


# --- parts --------------------------------------------------------------------------------------


def test_protocol(tiny_policy):
    assert isinstance(tiny_policy, Policy)
    assert tiny_policy.family == "sd3" and tiny_policy.media == "image"
    assert tiny_policy.denoiser is tiny_policy.pipeline.transformer


def test_noise_depends_on_the_seed_alone(tiny_policy):
    noise = tiny_policy.init_noise([5, 6, 5])
    assert noise[0].equal(noise[2]) and not noise[0].equal(noise[1])
    assert noise[1:2].equal(tiny_policy.init_noise([6])) and noise.dtype == torch.float32


def test_sigma_may_differ_by_row(tiny_policy):
    x, conditioning = tiny_policy.init_noise([1, 2]), tiny_policy.encode(PROMPTS[:2])
    with torch.no_grad():
        whole = tiny_policy.predict(x, torch.tensor([0.9, 0.3]), conditioning, 3.0)
        second = tiny_policy.predict(x[1:], torch.tensor(0.3), conditioning[1:], 3.0)
    torch.testing.assert_close(whole[1:], second, rtol=1e-4, atol=1e-5)


def test_decoding_is_differentiable(tiny_policy):
    latents = tiny_policy.init_noise([1]).requires_grad_()
    media = tiny_policy.decode(latents)
    assert media.data.shape == (1, 3, 32, 32) and 0 <= media.data.min() <= media.data.max() <= 1
    media.data.mean().backward()
    assert latents.grad.abs().max() > 0


def test_weights_in_bfloat16(fresh):
    policy = load_policy(fresh, dtype=torch.bfloat16)
    policy.max_sequence_length = 0
    x, conditioning = policy.init_noise([1]), policy.encode(PROMPTS[:1])
    with torch.no_grad():
        velocity = policy.predict(x, torch.tensor(0.5), conditioning, 3.0)
    assert x.dtype == velocity.dtype == policy.decode(x).data.dtype == torch.float32
    assert policy.denoiser.dtype == torch.bfloat16


def test_too_long_a_prompt_is_named(tiny_policy):
    long = "a photo of " + " ".join(["a red star and"] * 4)
    with pytest.raises(ValueError, match=r"has 21 tokens .* takes 16 .* by 5 tokens") as info:
        tiny_policy.encode([PROMPTS[0], long])
    assert repr(long) in str(info.value)


# --- loading ------------------------------------------------------------------------------------


def test_folder_round_trip(fresh, tmp_path):
    made = ours(SD3Policy(fresh, max_sequence_length=0))
    fresh.save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    policy.max_sequence_length = 0
    assert policy.name == str(tmp_path) and policy.sampler.height == 32
    assert ours(policy).equal(made)
    assert policy.identity.split("@")[1] == SD3Policy(fresh).identity.split("@")[1]


def test_recommended_sampler_beside_the_model(fresh, tmp_path):
    fresh.save_pretrained(tmp_path)
    advice = {"steps": 6, "guidance_scale": 2.0, "max_sequence_length": 0}
    (tmp_path / "sampler.json").write_text(json.dumps(advice))
    policy = load_policy(str(tmp_path))
    assert policy.sampler == Sampler(steps=6, guidance_scale=2.0, height=32, width=32)
    assert policy.max_sequence_length == 0
    media, nfe = generate(policy, PROMPTS[:1], SEEDS[:1])
    assert nfe == 12 and media.data.equal(generate(policy, PROMPTS[:1], SEEDS[:1], steps=6)[0].data)


def test_pipeline_object_is_used_in_place(fresh):
    fresh.vae.to(torch.bfloat16)  # users mix precisions; nothing may change that behind them
    policy = load_policy(fresh)
    assert policy.pipeline is fresh and policy.name == "StableDiffusion3Pipeline"
    assert fresh.vae.dtype == torch.bfloat16 and fresh.transformer.dtype == torch.float32
    assert load_policy(policy) is policy


def test_tiny_model_by_name():
    policy = load_policy("tiny-sd3")
    assert policy.name == "tiny-sd3" and policy.denoiser.dtype == torch.float32


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'shapes-flow'"):
        load_policy("shapes-flwo")
    with pytest.raises(UnknownNameError):
        load_policy(str(tmp_path / "absent" / "model"))
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        load_policy(tmp_path)
    with pytest.raises(ValueError, match="no policy family for Random"):
        load_policy(random.Random())
