"""The jobs that make the shipped small models, on a few steps of tiny data."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmalign.policies.build import SD3Size
from mmalign.policies.load import load_policy
from mmalign.sampling import generate
from mmalign.shapes import caption, parse, split_of
from mmalign.shapes.splits import held_out_pair
from trainers.muon import Muon, orthogonalise
from trainers.pretrain import data
from trainers.pretrain.autoencoder import AutoencoderConfig, train_autoencoder
from trainers.pretrain.captions import KINDS, CaptionTable, near_misses
from trainers.pretrain.denoiser import LatentPool
from trainers.pretrain.diffusion import (
    RECOMMENDED,
    DiffusionConfig,
    UNetSize,
    draw_times,
    train_diffusion,
)
from trainers.pretrain.generator import GeneratorConfig, train_generator

SIZE = SD3Size(width=32, layers=4, head_dim=16, text_width=32, text_layers=2)
UNET = UNetSize(channels=(16, 32), heads=2, text_width=32, text_layers=1)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHARD_SIZE", 160)


def vae_config(folder: Path, **options: object) -> AutoencoderConfig:
    settings = {"shards": 1, "steps": 4, "batch_size": 4, "save_every": 2, **options}
    return AutoencoderConfig(data=str(folder / "data"), out=str(folder / "vae"), **settings)


def flow_config(folder: Path, out: str, **options: object) -> GeneratorConfig:
    settings = {"shards": 1, "first_shards": 1, "steps": 4, "batch_size": 4, "save_every": 2}
    return GeneratorConfig(
        data=str(folder / "data"),
        vae=str(folder / "vae" / "vae"),
        out=str(folder / out),
        **{**settings, **options},
    )


def sd_config(folder: Path, out: str) -> DiffusionConfig:
    return DiffusionConfig(
        data=str(folder / "data"), out=str(folder / out), shards=2, first_shards=1, steps=4,
        batch_size=4, save_every=2,
    )  # fmt: skip


def test_shards_hold_training_scenes_only(tmp_path: Path) -> None:
    path = data.ensure_shards(tmp_path, 1)[0]
    specs = [parse(c) for c in data.load_captions(path)]
    assert len(specs) == 160
    assert all(split_of(s) == "train" for s in specs)
    assert not any(held_out_pair((o.color, o.shape)) for s in specs for o in s.objects if o.color)
    before = path.stat().st_mtime_ns
    assert data.ensure_shards(tmp_path, 1)[0].stat().st_mtime_ns == before
    assert np.load(path)["layouts"].shape == (160, 8, 8, 13)


def test_autoencoder_then_generator_make_a_loadable_pipeline(tmp_path: Path) -> None:
    vae = train_autoencoder(vae_config(tmp_path))
    settings = json.loads((vae / "config.json").read_text())
    assert settings["scaling_factor"] != 1.0 and settings["shift_factor"] != 0.0
    folder = train_generator(flow_config(tmp_path, "flow"), SIZE)
    policy = load_policy(folder)
    assert policy.max_sequence_length == 0
    media, _ = generate(policy, ["a photo of a red star"], [1], steps=2)
    assert media.data.shape == (1, 3, 64, 64)


def test_an_interrupted_generator_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    train_autoencoder(vae_config(tmp_path))
    whole = train_generator(flow_config(tmp_path, "whole"), SIZE)
    config = flow_config(tmp_path, "stopped")
    _stop_after(2, lambda: train_generator(config, SIZE))
    resumed = train_generator(config, SIZE)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        files = [next((f / name).glob("*.safetensors")).read_bytes() for f in (whole, resumed)]
        assert files[0] == files[1], name


def test_a_generator_goes_on_from_another_with_wrong_captions(tmp_path: Path) -> None:
    train_autoencoder(vae_config(tmp_path))
    first = train_generator(flow_config(tmp_path, "first"), SIZE)
    more = {"caption_noise": 1.0, "steps": 2, "layout_weight": 0.0}
    folder = train_generator(flow_config(tmp_path, "more", start=str(first), **more), SIZE)
    for name in ("transformer", "text_encoder", "vae"):
        one, two = (load_file(next((f / name).glob("*.safetensors"))) for f in (first, folder))
        drift = max((one[k].float() - two[k].float()).abs().max().item() for k in one)
        # Two small steps from the start, not from other random weights; the autoencoder is kept.
        assert (drift == 0) if name == "vae" else (0 < drift < 0.01), name
    right, wrong = (
        np.load(tmp_path / out / "latents" / "0000.npz")["tokens"] for out in ("first", "more")
    )
    assert (right != wrong).any(1).all()


def test_wrong_captions_are_near_misses_that_training_may_use() -> None:
    specs = [spec for spec, _ in itertools.islice(data.shard_scenes(0), 150)]
    said = CaptionTable().mislabelled([caption(s) for s in specs], 0.6, random.Random(0))
    changed = [(s, parse(t)) for s, t in zip(specs, said, strict=True) if parse(t) != s]
    assert 0.5 < len(changed) / len(specs) < 0.7
    kinds = set()
    for spec, wrong in changed:
        assert split_of(wrong) == "train"
        kinds |= {kind for kind, miss in near_misses(spec) if miss == wrong}
        assert wrong in {miss for _, miss in near_misses(spec)}
    assert kinds == set(KINDS)
    with pytest.raises(ValueError, match=r"caption_noise is 1\.5.*0 to 1"):
        GeneratorConfig(caption_noise=1.5)


def _stop_after(step: int, train: Callable[[], Path]) -> None:
    """Run a job that dies right after saving ``step``, by handing it a poisoned later batch."""
    original = LatentPool.batch

    def batch(self: LatentPool, at: int) -> object:
        if at >= step:
            raise KeyboardInterrupt
        return original(self, at)

    LatentPool.batch = batch  # type: ignore[assignment,method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            train()
    finally:
        LatentPool.batch = original  # type: ignore[method-assign]


def test_the_diffusion_generator_is_stock_resumable_and_loadable(tmp_path: Path) -> None:
    whole = train_diffusion(sd_config(tmp_path, "whole"), UNET)
    config = sd_config(tmp_path, "stopped")
    _stop_after(2, lambda: train_diffusion(config, UNET))
    resumed = train_diffusion(config, UNET)
    for name in ("unet", "text_encoder"):
        files = [next((f / name).glob("*.safetensors")).read_bytes() for f in (whole, resumed)]
        assert files[0] == files[1], name
    policy = load_policy(whole)
    assert policy.parameterisation == "epsilon" and policy.sampler.steps == RECOMMENDED["steps"]
    # Stock Stable Diffusion scales latents and never shifts them.
    assert policy.pipeline.vae.config.shift_factor == 0.0
    media, _ = generate(policy, ["a photo of a red star"], [1], steps=2)
    assert media.data.shape == (1, 3, 64, 64)


def test_times_follow_a_normal_of_the_log_signal_to_noise_ratio() -> None:
    abar = torch.cumprod(1 - torch.linspace(0.03, 0.11, 1000).double() ** 2, 0)
    config = DiffusionConfig(snr_mean=-0.5, snr_std=2.0)
    times = draw_times(torch.linspace(-2, 2, 9), abar, config)
    ratio = (abar / (1 - abar)).log()
    wanted = -0.5 + 2 * torch.linspace(-2, 2, 9).double()
    for time, value in zip(times.tolist(), wanted.tolist(), strict=True):
        assert ratio[time] <= value <= ratio[time - 1]
    assert draw_times(torch.tensor([-9.0, 9.0]), abar, config).tolist() == [999, 0]


@pytest.mark.parametrize("shape", [(8, 8), (8, 32), (32, 8)])
def test_orthogonalised_singular_values_are_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_minimises_a_quadratic_with_matrices_and_vectors() -> None:
    torch.manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(s)) for s in ((6, 6), (6,)))
    optimizer = Muon([weight, bias], lr=0.05, adam_lr=0.05)
    first = float(weight.square().sum() + bias.square().sum())
    for step in range(300):
        for group in optimizer.param_groups:
            group["scale"] = 1 - step / 300
        loss = weight.square().sum() + bias.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01 * first
