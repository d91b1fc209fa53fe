"""Pictures to latents: what ``decode`` inverts, in every family."""

from __future__ import annotations

import pytest
import torch

from mmalign.policies.load import load_policy
from mmalign.sampling import generate
from mmalign.shapes import TASKS, caption, sample_spec
from mmalign.types import Media

FAMILIES = ("tiny-sd", "tiny-sdxl", "tiny-sd3", "tiny-flux")


def pictures(policy, count: int = 2) -> Media:
    size = (policy.sampler.height, policy.sampler.width)
    return Media(torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("statistics", [False, True])
def test_the_autoencoder_gets_back_what_it_gave(name, statistics):
    policy = load_policy(name, device="cpu")
    vae, media = policy.pipeline.vae, pictures(policy)
    channels = policy.latent_shape[0]
    if statistics:  # as SDXL-class autoencoders may have them
        vae.register_to_config(
            latents_mean=[0.1 * k for k in range(channels)], latents_std=[2.0] * channels
        )
    latents = policy.encode_image(media)
    assert latents.shape == (2, *policy.latent_shape) == policy.init_noise([0, 1]).shape
    assert latents.dtype == torch.float32 and not latents.requires_grad
    with torch.no_grad():
        found = vae.encode(media.data * 2 - 1)
    own = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
    torch.testing.assert_close(policy._unscaled(latents), own, rtol=1e-5, atol=1e-6)
    assert policy.encode_image(media).equal(latents)  # the mean, not a draw


def test_shapes_pictures_survive_the_round_trip():
    policy = load_policy("shapes-flow", device="cpu")
    import random

    rng = random.Random(0)
    prompts = [caption(sample_spec(rng, "train", TASKS[i])) for i in range(4)]
    media, _ = generate(policy, prompts, [0, 1, 2, 3], steps=4)
    again = policy.decode(policy.encode_image(media))
    error = (again.data - media.data).square().flatten(1).mean(1)
    shuffled = (again.data.roll(1, 0) - media.data).square().flatten(1).mean(1)
    assert bool((error < 0.05 * shuffled).all()), (error, shuffled)


def test_refusals():
    policy = load_policy("tiny-sd", device="cpu")
    with pytest.raises(ValueError, match=r"takes pictures of 32 x 32.*image of 16 x 16"):
        policy.encode_image(Media(torch.rand(1, 3, 16, 16)))
    with pytest.raises(ValueError, match="got a video"):
        policy.encode_image(Media(torch.rand(1, 2, 3, 32, 32)))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_fits_is_what_encodes(name):
    policy = load_policy(name, device="cpu")
    long = "a photo of a red star " * 40
    assert policy.fits("a red star") and not policy.fits(long)
    with pytest.raises(ValueError, match="tokens"):
        policy.encode([long])


def test_the_identity_is_that_of_the_autoencoder():
    one, other = load_policy("tiny-sd", device="cpu"), load_policy("tiny-sd", device="cpu")
    assert one.codec_identity == other.codec_identity
    with torch.no_grad():
        next(other.pipeline.vae.parameters()).add_(1e-3)
    assert one.codec_identity != other.codec_identity
    one.pipeline.vae.register_to_config(scaling_factor=0.5)
    assert one.codec_identity != load_policy("tiny-sd", device="cpu").codec_identity
