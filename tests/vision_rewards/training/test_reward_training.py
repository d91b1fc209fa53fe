"""End to end on rendered pictures: labels on disk to a reward that is usable at once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.config import ConfigError
from mmalign.types import Media, Score
from vision_rewards.factory import load_reward
from vision_rewards.training import features as feature_files
from vision_rewards.training.backbones import load_backbone
from vision_rewards.training.config import (
    BackboneConfig,
    FitConfig,
    HeadConfig,
    LossConfig,
    RewardTrainConfig,
)
from vision_rewards.training.features import read_pictures
from vision_rewards.training.records import read_records
from vision_rewards.training.train import train_reward
from vision_rewards.training.trained import TrainedRewardError, load_trained
from vision_rewards.training.users import fit_user


def config(data: Path, folder: Path, **changes: Any) -> RewardTrainConfig:
    settings: dict[str, Any] = {
        "data": str(data),
        "backbone": BackboneConfig(checkpoint=str(folder)),
        "output_dir": str(data.parent / "reward"),
        "cache_dir": str(folder / "features"),
        "device": "cpu",
        "test": 0.25,
        "fit": FitConfig(epochs=30, lr=3e-3),
        "head": HeadConfig(features="image", hidden=16),
    }
    return RewardTrainConfig(**{**settings, **changes})


def measures(data: Path) -> dict[str, Any]:
    report = json.loads((data.parent / "reward" / "report.json").read_text())
    found: dict[str, Any] = report["measures"]["test"]
    return found


def scores(reward: Any, world: Any, **context: Any) -> Score:
    pixels = torch.stack(read_pictures([p.path for p in world]))
    with torch.no_grad():
        return reward.score(Media(pixels), [p.prompt for p in world], [context] * len(world))


def taste(picture: Any) -> float:
    return picture.warmth


def test_pairs_to_a_usable_reward(pairs_file: Path, open_clip_folder: Path, world: Any) -> None:
    made = train_reward(config(pairs_file, open_clip_folder))
    found = measures(pairs_file)
    assert found["accuracy"]["value"] > 0.8  # chance: 0.5
    assert found["accuracy"]["wilson"][0] > 0.65
    assert found["calibration"]["ece"] < 0.25
    folder = pairs_file.parent / "reward"
    assert "calibration error" in (folder / "report.md").read_text()
    assert (folder / "calibration.svg").read_text().startswith("<svg")

    loaded = load_reward(str(folder))
    assert loaded.identity == made.identity
    got = scores(loaded, world[:40])
    assert got.valid.all() and got.value.equal(scores(made, world[:40]).value)
    assert got.identity == loaded.identity and loaded.info.needs == ()
    everything = scores(loaded, world).value
    assert abs(float(everything.mean())) < 0.3 and 0.7 < float(everything.std()) < 1.3
    together = load_reward(f"2*{folder} + shapes_partial")
    assert torch.allclose(scores(together, world[:4]).parts[str(folder)], got.value[:4], atol=1e-5)


def test_gradients_reach_the_pixels(pairs_file: Path, open_clip_folder: Path, world: Any) -> None:
    reward = train_reward(config(pairs_file, open_clip_folder, fit=FitConfig(epochs=2)))
    pixels = torch.stack(read_pictures([p.path for p in world[:3]])).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(Media(pixels), ["x"] * 3).value.sum(), pixels)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        low, high = (reward.score(Media(pixels + k * step), ["x"] * 3) for k in (-1, 1))
    slope = float((high.value - low.value).sum()) / 2e-2
    assert slope == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize("name", ["gaussian", "hinge", "davidson", "rao_kupper"])
def test_other_losses_of_pairs(name: str, world: Any, write: Any, open_clip_folder: Path) -> None:
    rows = []
    for a, b in zip(world[::2], world[1::2], strict=True):
        d = taste(a) - taste(b)
        label = "tie" if abs(d) < 0.3 else "a" if d > 0 else "b"
        images = {"image_a": str(a.path), "image_b": str(b.path)}
        rows.append({"prompt": a.prompt, **images, "label": label})
    data = write(rows)
    reward = train_reward(config(data, open_clip_folder, loss=LossConfig(name=name)))
    found = measures(data)
    assert found["accuracy"]["value"] > 0.8 and found["ties"] > 3
    assert ("accuracy_with_ties" in found) == (name in ("davidson", "rao_kupper"))
    got = scores(reward, world[:8])
    assert ("std" in got.parts) == (name == "gaussian")
    if name == "gaussian":
        assert (got.parts["std"] > 0).all()


def test_ratings(world: Any, write: Any, open_clip_folder: Path) -> None:
    data = write([{"image": str(p.path), "rating": 3 + 2 * taste(p)} for p in world])
    reward = train_reward(config(data, open_clip_folder))
    assert measures(data)["spearman"]["interval"][0] > 0.6
    # In the units of the ratings.
    truth = torch.tensor([3 + 2 * taste(p) for p in world])
    assert float((scores(reward, world).value - truth).abs().mean()) < 0.7


@pytest.mark.parametrize("name", ["bce", "focal", "cross_prompt"])
def test_single_labels(name: str, world: Any, write: Any, open_clip_folder: Path) -> None:
    rows = [{"prompt": p.prompt, "image": str(p.path), "label": int(taste(p) > 0.2)} for p in world]
    data = write(rows)
    reward = train_reward(config(data, open_clip_folder, loss=LossConfig(name=name)))
    assert measures(data)["auroc"]["bootstrap"][0] > 0.75
    if name != "cross_prompt":
        assert reward.info.range == (0.0, 1.0)
        value = scores(reward, world).value
        assert 0 <= float(value.min()) < 0.4 and 0.6 < float(value.max()) <= 1


def test_rankings(world: Any, write: Any, open_clip_folder: Path) -> None:
    rng = random.Random(0)
    rows = []
    for k in range(0, len(world), 4):
        group = sorted(world[k : k + 4], key=taste, reverse=True)[: rng.choice([3, 4])]
        rows.append({"prompt": f"number {k}", "images": [str(p.path) for p in group]})
    data = write(rows)
    train_reward(config(data, open_clip_folder))
    assert measures(data)["accuracy"]["bootstrap"][0] > 0.7


def test_popularity(world: Any, write: Any, open_clip_folder: Path) -> None:
    """Implicit feedback with Social Reward's triplet loss on the cosine with the prompt."""
    rng = random.Random(0)
    rows = [
        {
            "prompt": p.prompt,
            "image": str(p.path),
            "count": round(20 * (1 + taste(p)) + rng.random()),
            "views": 40,
        }
        for p in world
    ]
    data = write(rows)
    changes = {"head": HeadConfig(kind="cosine"), "loss": LossConfig(name="triplet")}
    reward = train_reward(
        config(data, open_clip_folder, fit=FitConfig(epochs=60, lr=1e-2), **changes)
    )
    assert measures(data)["accuracy"]["wilson"][0] > 0.6
    value = scores(reward, world).value
    assert reward.info.needs == ("prompt",) and value.abs().max() <= 1 + 1e-5


def test_annotators_with_opposite_tastes(world: Any, write: Any, open_clip_folder: Path) -> None:
    """PAL: one head, an ideal point each; a newcomer needs a few comparisons."""
    tastes: Mapping[str, Callable[[Any], float]] = {"ann": taste, "bob": lambda p: -taste(p)}
    rows = []
    for number, (a, b) in enumerate(zip(world[::2], world[1::2], strict=True)):
        for user, like in tastes.items():
            label = "a" if like(a) > like(b) else "b"
            images = {"image_a": str(a.path), "image_b": str(b.path)}
            rows.append({"prompt": str(number), **images, "label": label, "user": user})
    data = write(rows)
    head = HeadConfig(kind="ideal_point", features="image", prototypes=2, dim=8, hidden=16)
    reward = train_reward(
        config(data, open_clip_folder, head=head, fit=FitConfig(epochs=40, lr=1e-2))
    )
    assert measures(data)["accuracy"]["wilson"][0] > 0.65  # a common taste could reach 0.5
    by_user = {name: scores(reward, world, user=name).value for name in (*tastes, "nobody")}
    assert torch.corrcoef(torch.stack([by_user["ann"], by_user["bob"]]))[0, 1] < -0.5
    assert by_user["nobody"].equal(scores(reward, world).value)

    few = [
        {k: v for k, v in row.items() if k != "user"}
        for row in rows[1:41:2]  # bob's, under no name
    ]
    fit_user(reward, "new", read_records(write(few, "few.jsonl")))
    new = scores(reward, world, user="new").value
    assert torch.corrcoef(torch.stack([new, by_user["bob"]]))[0, 1] > 0.8
    assert scores(reward, world, user="ann").value.equal(by_user["ann"])
    reward.save(data.parent / "kept")
    again = load_reward(str(data.parent / "kept"))
    assert scores(again, world[:9], user="new").value.allclose(new[:9], atol=1e-5)
    assert again.identity == reward.identity


def test_features_are_computed_once(
    pairs_file: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(pairs_file.parent / "cache")
    asked: list[int] = []
    original = feature_files.read_pictures
    monkeypatch.setattr(
        feature_files, "read_pictures", lambda paths: asked.append(len(paths)) or original(paths)
    )
    for number, seed in enumerate((0, 1)):
        output = str(pairs_file.parent / f"run{number}")
        train_reward(
            config(
                pairs_file, clip_folder, seed=seed, cache_dir=cache, output_dir=output,
                fit=FitConfig(epochs=1),
            )
        )  # fmt: skip
    assert sum(asked) == 480


def test_lora_tunes_a_copy_and_travels_with_the_reward(
    pairs_file: Path, clip_folder: Path, world: Any, write: Any
) -> None:
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()][:60]
    data = write(rows, "few.jsonl")
    frozen = load_reward(f"clip_score@{clip_folder}")
    before = scores(frozen, world[:4]).value
    backbone = BackboneConfig(
        checkpoint=str(clip_folder), lora_rank=2, lora_targets=("fc1", "fc2"), dtype="bf16"
    )
    made = train_reward(
        config(
            data, clip_folder, backbone=backbone, head=HeadConfig(kind="cosine"), validation=0.0,
            fit=FitConfig(epochs=2, batch_size=16, backbone_lr=1e-2),
        )
    )  # fmt: skip
    folder = data.parent / "reward"
    assert {f.name for f in (folder / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    loaded = load_trained(folder)
    assert loaded.identity == made.identity and "+" in loaded.identity
    got = scores(loaded, world[:4]).value
    assert got.equal(scores(made, world[:4]).value)
    assert scores(frozen, world[:4]).value.equal(before)  # the shared towers are untouched
    pictures = read_pictures([p.path for p in world[:4]])
    with torch.no_grad():
        tuned = loaded.backbone.image(pictures, [""] * 4)
        plain = load_backbone(replace(backbone, lora_rank=0)).image(pictures, [""] * 4)
    assert {p.dtype for n, p in made.backbone.network.named_parameters() if "lora_" in n} == {
        torch.float32
    }
    assert not torch.allclose(tuned, plain, atol=1e-3)
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError):
        load_trained(folder)


def test_another_backbone_is_refused(
    pairs_file: Path, open_clip_folder: Path, clip_folder: Path
) -> None:
    train_reward(config(pairs_file, open_clip_folder, fit=FitConfig(epochs=1)))
    with pytest.raises(TrainedRewardError, match="was trained on weights"):
        load_trained(pairs_file.parent / "reward", checkpoint=str(clip_folder))
    with pytest.raises(TrainedRewardError, match=r"holds no reward\.json"):
        load_trained(pairs_file.parent)


def test_a_run_with_other_settings_does_not_continue(
    pairs_file: Path, open_clip_folder: Path
) -> None:
    train_reward(config(pairs_file, open_clip_folder, fit=FitConfig(epochs=1)))
    other = config(pairs_file, open_clip_folder, fit=FitConfig(epochs=2))
    with pytest.raises(ConfigError, match="another configuration or other data"):
        train_reward(other)
    train_reward(other, resume=False)
