"""The jobs that make the shipped small models, on a few steps of tiny data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.policies.build import SD3Size
from mmalign.policies.load import load_policy
from mmalign.sampling import generate
from mmalign.shapes import parse, split_of
from mmalign.shapes.splits import held_out_pair
from trainers.muon import Muon, orthogonalise
from trainers.pretrain import data
from trainers.pretrain.autoencoder import AutoencoderConfig, train_autoencoder
from trainers.pretrain.generator import GeneratorConfig, train_generator

SIZE = SD3Size(width=32, layers=4, head_dim=16, text_width=32, text_layers=2)


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
    _stop_after(tmp_path, 2)
    resumed = train_generator(flow_config(tmp_path, "stopped"), SIZE)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        files = [next((f / name).glob("*.safetensors")).read_bytes() for f in (whole, resumed)]
        assert files[0] == files[1], name


def _stop_after(folder: Path, step: int) -> None:
    """Run a job that dies right after saving ``step``, by handing it a poisoned later batch."""
    config = flow_config(folder, "stopped", seed=0)
    from trainers.pretrain import generator

    original = generator.LatentPool.batch

    def batch(self: object, at: int) -> object:
        if at >= step:
            raise KeyboardInterrupt
        return original(self, at)  # type: ignore[arg-type]

    generator.LatentPool.batch = batch  # type: ignore[assignment,method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            train_generator(config, SIZE)
    finally:
        generator.LatentPool.batch = original  # type: ignore[method-assign]


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
