"""The shipped small reward models: that they load, keep their word, and reach stated floors."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.assets import asset
from mmalign.shapes import caption, render, sample_scene, sample_spec
from mmalign.types import Media
from trainers.pretrain.aesthetic import liked_pictures, pair_accuracy
from trainers.pretrain.artifact import rendered
from trainers.pretrain.clip_eval import near_miss_accuracy
from trainers.pretrain.corruption import CORRUPTIONS
from trainers.pretrain.measures import auroc
from trainers.pretrain.scenes import to_pixels
from vision_rewards.base import PixelReward
from vision_rewards.shapes_models import (
    ArtifactNet,
    ShapesAesthetic,
    ShapesArtifact,
    ShapesClip,
    read_folder,
)
from vision_rewards.sharing import shared_forward

BUDGET = {"shapes-clip": 4e6, "shapes-aesthetic": 0.5e6, "shapes-artifact": 0.5e6}
REWARDS = {"clip": ShapesClip, "aesthetic": ShapesAesthetic, "artifact": ShapesArtifact}


def values(reward: PixelReward, pixels: Tensor, prompts: list[str] | None = None) -> np.ndarray:
    """Scores ``(B,)`` without gradient."""
    with torch.no_grad():
        return reward.score(Media(pixels), prompts or [""] * len(pixels)).value.numpy()


def pictures(count: int, seed: int = 0, task: str | None = None) -> tuple[Tensor, list[str]]:
    """Renders of test scenes and their captions."""
    rng = random.Random(f"models {seed}")
    specs = [sample_spec(rng, "test", task) for _ in range(count)]
    images = np.stack([np.asarray(render(sample_scene(s, rng))) for s in specs])
    return to_pixels(images), [caption(s) for s in specs]


# --- what ships ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUDGET)
def test_weights_are_small_and_hold_tensors_only(name: str) -> None:
    files = [f for f in asset(name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < BUDGET[name]
    assert {f.suffix for f in files} == {".json", ".safetensors"}


@pytest.mark.parametrize("kind", REWARDS)
def test_cards_state_what_ships(kind: str) -> None:
    reward = REWARDS[kind]()
    info = reward.info
    assert info.licence == "Apache-2.0" and asset(info.checkpoint.removeprefix("assets/")).is_dir()
    modules = reward.networks()[-1:] if kind == "aesthetic" else reward.networks()
    count = sum(p.numel() for m in modules for p in m.parameters()) / 1e6
    assert count == pytest.approx(info.parameters, rel=0.02)


def test_the_clip_is_a_stock_open_clip_folder() -> None:
    import open_clip

    folder = f"local-dir:{asset('shapes-clip')}"
    model, transform = open_clip.create_model_from_pretrained(folder)
    tokens = open_clip.get_tokenizer(folder)(["a photo of two red crosses"])
    assert type(model) is open_clip.CLIP
    assert (tokens != tokens[0, -1]).sum() == 7  # the start and one token a word
    pixels, prompts = pictures(4)
    inputs = torch.stack([transform(p) for p in Media(pixels).to_pil()])
    with torch.no_grad():
        image = model.encode_image(inputs, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(folder)(prompts), normalize=True)
    own = values(ShapesClip(), pixels, prompts)
    assert np.allclose(own, (image * text).sum(1).numpy(), atol=1e-4)


# --- floors -------------------------------------------------------------------------------------


def test_the_clip_tells_near_misses_apart_on_held_out_compositions() -> None:
    found = near_miss_accuracy(ShapesClip().embedder, 420, "test", seed=7)
    floors = {"color": 0.97, "count": 0.96, "object": 0.97, "shape": 0.96, "swap": 0.9}
    for kind, floor in floors.items():
        assert found[kind].value > floor, (kind, str(found[kind]))
    assert found["relation"].value > 0.85, str(found["relation"])


def test_the_clip_ranks_pictures_of_one_prompt() -> None:
    pixels, prompts = pictures(60, 3, "color_attr")
    reward = ShapesClip()
    right = values(reward, pixels, prompts)
    wrong = values(reward, pixels.roll(1, 0), prompts)
    assert (right > wrong).mean() > 0.95


def test_the_aesthetic_head_follows_the_written_taste_in_every_term() -> None:
    reward = ShapesAesthetic()
    liked = liked_pictures(500, "test", 11)
    found = pair_accuracy(reward.head, reward.embedder, liked, reward.blocks)
    floors = {"clean": 0.8, "harmony": 0.88, "balance": 0.85, "edges": 0.68}
    assert all(found[k] > floor for k, floor in floors.items()), found
    assert found["noisy"] > 0.9 * found["ceiling"]
    scores = values(reward, to_pixels(np.stack([p.picture for p in liked[:200]])))
    assert abs(scores.mean()) < 0.5 and 0.5 < scores.std() < 1.5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_artefact_network_finds_synthetic_artefacts(name: str) -> None:
    clean = to_pixels(rendered(60, "test", 21))
    spoilt = CORRUPTIONS[name](clean, torch.Generator().manual_seed(5))
    scores = values(ShapesArtifact(), torch.cat([clean, spoilt]))
    # Measured over 400 pictures: 0.96 (warp), 0.97 (broken), 0.99 and above for the others.
    assert auroc(scores, np.arange(120) < 60).value > 0.9
    assert scores[:60].mean() > 0.85


def test_the_artefact_network_judges_the_picture_not_the_prompt() -> None:
    pixels, prompts = pictures(8)
    reward = ShapesArtifact()
    assert np.array_equal(values(reward, pixels, prompts), values(reward, pixels, prompts[::-1]))


# --- how they behave ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REWARDS)
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    reward = REWARDS[kind]()
    pixels, prompts = pictures(2)
    pixels = (pixels * 0.9 + 0.05).requires_grad_()
    value = reward.score(Media(pixels), prompts).value.sum()
    (gradient,) = torch.autograd.grad(value, pixels)
    direction = gradient / gradient.norm()
    step = 1e-2
    with torch.no_grad():
        up, down = (reward.score(Media(pixels + s * direction), prompts) for s in (step, -step))
    slope = (up.value.sum() - down.value.sum()) / (2 * step)
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.1)


@pytest.mark.parametrize("kind", REWARDS)
def test_ascending_the_pixels_raises_the_score(kind: str) -> None:
    reward = REWARDS[kind]()
    pixels, prompts = pictures(2, 5)
    pixels = CORRUPTIONS["bleeding"](pixels, torch.Generator().manual_seed(0))
    before = values(reward, pixels, prompts)
    for _ in range(5):
        pixels.requires_grad_()
        (gradient,) = torch.autograd.grad(reward.score(Media(pixels), prompts).value.sum(), pixels)
        length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        pixels = (pixels + 0.2 * gradient / length).detach().clamp(0, 1)
    assert (values(reward, pixels, prompts) > before).all()


def test_one_forward_serves_clip_and_long_prompts_are_noted() -> None:
    reward, again = ShapesClip(), ShapesClip(scale=10.0)
    assert reward.embedder is again.embedder and reward.identity != again.identity
    calls: list[int] = []
    handle = reward.embedder.image_tower.register_forward_hook(lambda *_: calls.append(1))
    media = Media(pictures(3)[0])
    long = "a photo of " + "a red star and " * 9 + "a blue circle"
    with torch.no_grad(), shared_forward():
        one = reward.score(media, ["a photo of a red star", long, ""])
        ten = again.score(media, ["a photo of a red star", long, ""])
    handle.remove()
    assert len(calls) == 1
    assert torch.allclose(10 * one.value, ten.value)
    assert "longer" in one.notes[1] and not one.notes[0]


@pytest.mark.parametrize("kind", REWARDS)
def test_other_sizes_are_scored(kind: str) -> None:
    rng = random.Random(1)
    spec = sample_spec(rng, "test", "colors")
    scene = sample_scene(spec, rng)
    for size in (8, 64, 200):
        pixels = to_pixels(np.asarray(render(scene, size))[None])
        assert np.isfinite(values(REWARDS[kind](), pixels, [caption(spec)])).all()


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        ShapesArtifact(tmp_path)
    with pytest.raises(ValueError, match="scale must be positive, got -1"):
        ShapesClip(scale=-1.0)
    config, state = read_folder(asset("shapes-artifact"))
    assert set(state) == set(ArtifactNet(config["width"]).state_dict())


def test_a_head_refuses_another_backbone(tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(asset("shapes-aesthetic"), tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "backbone": "0123456789ab"}))
    with pytest.raises(ValueError, match="trained on backbone 0123456789ab"):
        ShapesAesthetic(tmp_path / "head")
