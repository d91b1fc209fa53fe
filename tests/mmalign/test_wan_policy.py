"""The Wan class: videos equal to the stock pipeline's, its codec, what it refuses."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mmalign.policies.load import load_policy
from mmalign.policies.tiny import tiny_wan
from mmalign.policies.wan import WanPolicy, use_euler
from mmalign.sampling import generate
from mmalign.types import Media

PROMPTS = ["a red star", "two blue circles"]


@pytest.fixture
def pipeline():
    made = tiny_wan(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_videos_are_the_stock_pipelines(pipeline, guidance):
    media, nfe = generate(load_policy(pipeline), PROMPTS, [1, 2], steps=3, guidance_scale=guidance)
    stock = pipeline(
        prompt=PROMPTS, height=32, width=32, num_frames=5, num_inference_steps=3,
        guidance_scale=guidance, generator=[torch.Generator().manual_seed(s) for s in (1, 2)],
        output_type="pt", max_sequence_length=32,
    ).frames  # fmt: skip
    assert media.kind == "video" and media.data.shape == (2, 5, 3, 32, 32)
    assert torch.allclose(media.data, stock, atol=2e-6)
    assert nfe == (6 if guidance == 1 else 12)
    assert media.data.std() > 0.01  # no blank video, which would be equal for nothing


def test_a_video_does_not_depend_on_its_batch(pipeline):
    policy = load_policy(pipeline)
    both, _ = generate(policy, PROMPTS, [1, 2], steps=2)
    alone, _ = generate(policy, PROMPTS[1:], [2], steps=2)
    assert torch.allclose(both.data[1:], alone.data, atol=2e-6)


def test_latents_of_videos(pipeline):
    policy = load_policy(pipeline)
    assert policy.latent_shape == (16, 2, 4, 4) == policy.init_noise([0]).shape[1:]
    video = Media(torch.rand(1, 5, 3, 32, 32))
    latents = policy.encode_image(video)
    # The stock scale of the published pipeline: (z - mean) / std for each channel.
    with torch.no_grad():
        raw = pipeline.vae.encode(video.data.transpose(1, 2) * 2 - 1).latent_dist.mode()
    config = pipeline.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1)
                 for v in (config.latents_mean, config.latents_std))  # fmt: skip
    assert torch.allclose(latents, (raw - mean) / std, atol=1e-5)
    back = pipeline.vae.decode(raw, return_dict=False)[0].transpose(1, 2) / 2 + 0.5
    assert torch.allclose(policy.decode(latents).data, back.clamp(0, 1), atol=1e-5)
    with pytest.raises(ValueError, match=r"takes videos of 5 x 3 x 32 x 32.*got one image"):
        policy.encode_image(Media(torch.rand(1, 3, 32, 32)))


def test_by_name_the_sampler_is_eulers_of_the_same_shift(capsys):
    policy = load_policy("tiny-wan")
    assert policy.pipeline.scheduler.config.shift == 3.0 and policy.media == "video"
    assert "Euler's steps in place of UniPCMultistepScheduler" in capsys.readouterr().err
    # 3 s / (1 + 2 s): the shifted grid starts at 1 and ends at 0.
    sigmas = policy.sigmas(4)
    assert sigmas[0] == 1.0 and sigmas[-1] == 0.0
    assert policy.sampler.height == 32 and policy.num_frames == 5


def test_refusals(pipeline):
    with pytest.raises(ValueError, match=r"1, 5, 9, .* not of 7; use num_frames 5 or 9"):
        WanPolicy(pipeline, num_frames=7)
    with pytest.raises(ValueError, match="needs a FlowMatchEulerDiscreteScheduler"):
        WanPolicy(tiny_wan())
    other = tiny_wan()
    use_euler(other)
    other.register_to_config(expand_timesteps=True)
    with pytest.raises(ValueError, match=r"Wan 2\.2\) are not supported"):
        WanPolicy(other)
    with pytest.raises(ValueError, match=r"prompt has .* tokens"):
        load_policy(pipeline).encode(["star " * 60])
