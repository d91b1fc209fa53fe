"""Training SD, SDXL and FLUX class models: every family through the real loop, DDPO included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny

from mmalign.policies.load import load_policy
from mmalign.policies.tiny import tiny_flux, tiny_sd, tiny_sdxl
from mmalign.runtime.log import read_jsonl
from mmalign.sampling import KernelMismatchError, generate
from trainers import entry
from trainers.bench import bench
from trainers.preflight import preflight

PROMPTS = ["a photo of a red star", "a photo of two circles"]
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
KERNELS = {"tiny-sd": "ddim", "tiny-sdxl": "ddim", "tiny-flux": "flow_sde"}
BUILDERS = {"tiny-sd": tiny_sd, "tiny-sdxl": tiny_sdxl, "tiny-flux": tiny_flux}
families = pytest.mark.parametrize("name", KERNELS)


def recipe(kit, folder, name: str, **changes):
    """A cheap run of a family with the kernel that fits it, trained by LoRA."""
    options = {
        "model__adapter": "lora",
        "model__lora_rank": 4,
        "model__lora_alpha": 12,
        "rollout__kernel": KERNELS.get(name, "ddim"),
        "optim__lr": 0.03,
        **changes,
    }
    if options["model__adapter"] == "lora" and name != "tiny-flux":
        options["model__lora_targets"] = UNET_TARGETS
    return replace(kit.cheap(folder, **options), policy=name)


@families
def test_lora_trains_and_stock_diffusers_loads_it(kit, tmp_path, name):
    drawn = {}

    def evaluate(policy, config, folder, label):
        media, _ = generate(policy, PROMPTS, [5, 6], steps=3, guidance_scale=2.0)
        drawn[label] = media.data

    config = recipe(kit, tmp_path, name, steps=2, objective={"kl_beta": 0.01, "clip_range": 1e-3})
    folder = entry.train(config, reward=kit.brightness, evaluate=evaluate)
    first, second = read_jsonl(folder / "metrics.jsonl")
    assert first["ratio/max_deviation"] < 1e-6 and first["kl"] < 1e-12 < second["kl"]
    assert first["grad_norm"] > 0 and not drawn["after"].equal(drawn["before"])
    policy = load_policy(BUILDERS[name](), lora=folder / "lora")
    stock = generate(policy, PROMPTS, [5, 6], steps=3, guidance_scale=2.0)[0].data
    torch.testing.assert_close(stock, drawn["after"], rtol=1e-4, atol=1e-5)


@families
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_parameter_is_reached(kit, tmp_path, name, guidance):
    config = recipe(kit, tmp_path, name, model__adapter="full", rollout__guidance_scale=guidance)
    report = preflight(entry.build(config, tmp_path, kit.brightness))
    assert report.ok, report.failures


@pytest.fixture
def bright_folder(tmp_path):
    """An SD pipeline whose decoder, free of normalisation, can change a picture's brightness."""
    pipeline = tiny_sd()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(0, 1),
            num_decoder_blocks=(1, 0),
            latent_channels=4,
        )
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_ddpo_raises_brightness(kit, tmp_path, bright_folder):
    """The same seeds are brighter after training, by far more than chance explains."""
    config = recipe(
        kit, tmp_path, str(bright_folder), model__adapter="full", steps=10, images_per_prompt=16,
        optim__lr=3e-3, objective={"clip_range": 1e-2}, advantage__baseline="tracker",
        rollout__kernel="ddim", rollout__kernel_options={"eta": 1.0}, rollout__steps=5,
    )  # fmt: skip
    trainer = entry.build(config, tmp_path, kit.brightness)

    def brightness() -> torch.Tensor:
        media, _ = generate(trainer.policy, PROMPTS * 8, range(16), steps=5, guidance_scale=1.0)
        return media.data.flatten(1).mean(1)

    before = brightness()
    trainer.run()
    gain = brightness() - before
    assert gain.mean() > 0.1 * before.mean() and gain.mean() > 5 * gain.std() / 16**0.5


def test_evaluations_are_counted_per_family(kit, tmp_path):
    for name, branches in (("tiny-sd", 2), ("tiny-flux", 1)):
        config = recipe(kit, tmp_path, name, rollout__guidance_scale=2.0, advantage__std="group")
        metrics = entry.build(config, tmp_path, kit.brightness).train_step()
        assert metrics["nfe"] == 8 * branches * (3 + 2)


def test_a_kernel_of_the_other_kind_stops_before_any_work(kit, tmp_path):
    config = recipe(kit, tmp_path, "tiny-sd", rollout__kernel="flow_sde")
    with pytest.raises(KernelMismatchError, match=r"predicts epsilon; .* fit: .*ddim"):
        entry.build(config, tmp_path, kit.brightness)


def test_bench_takes_the_kernel_that_fits():
    result = bench(
        "random:sdxl-tiny", device="cpu", dtype="fp32", batch_size=2, images=2, steps=3, size=16,
        repeats=1, lora_rank=4, threads=1,
    )  # fmt: skip
    assert result["stages"]["update"]["seconds"]["median"] > 0
    assert result["stages"]["rollout"]["work"]["network_evaluations"] == 2 * 3 * 2
