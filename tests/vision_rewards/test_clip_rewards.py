"""CLIPScore, PickScore, HPSv2 and v2.1."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.types import Media
from vision_rewards.clip_rewards import ClipScore, Hpsv2, Hpsv21, PickScore
from vision_rewards.embedding import load_embedder

Pictures = Callable[..., Tensor]
PROMPTS = ["a red cat", "日本語の猫", "a very " * 60 + "long prompt"]


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory: pytest.TempPathFactory, open_clip_state: dict[str, Tensor]) -> Path:
    """A checkpoint in the published form."""
    file = tmp_path_factory.mktemp("hps") / "HPS_v2_compressed.pt"
    torch.save({"epoch": 1, "name": "hps", "state_dict": open_clip_state}, file)
    return file


def test_clip_score_is_the_cosine_of_each_pair(clip_folder: Path, pictures: Pictures) -> None:
    reward, embedder = ClipScore(clip_folder), load_embedder(clip_folder)
    pixels = pictures()
    table = embedder.image(pixels) @ embedder.text(PROMPTS).T
    got = reward.score(Media(pixels), PROMPTS)
    assert torch.allclose(got.value, table.diagonal(), atol=1e-6)
    assert got.valid.all() and got.notes[0] == got.notes[1] == ""
    assert "longer than the context" in got.notes[2]


def test_clip_score_options(clip_folder: Path, pictures: Pictures) -> None:
    media = Media(pictures())
    plain = ClipScore(clip_folder).score(media, ["A photo depicts " + p for p in PROMPTS]).value
    reward = ClipScore(clip_folder, prefix="A photo depicts ", clamp=True, multiplier=2.5)
    assert torch.allclose(reward.score(media, PROMPTS).value, 2.5 * plain.clamp_min(0))
    assert reward.info.range == (0.0, 2.5) and ClipScore.info.range == (-1.0, 1.0)
    others = [ClipScore(clip_folder), ClipScore(clip_folder, multiplier=2), reward]
    assert len({r.identity for r in others}) == 3
    with pytest.raises(ValueError, match="multiplier must be positive"):
        ClipScore(clip_folder, multiplier=-1)


def test_clip_score_of_any_embedding_model(
    siglip_folder: Path, open_clip_folder: Path, pictures: Pictures
) -> None:
    for folder in (siglip_folder, open_clip_folder):
        got = ClipScore(folder).score(Media(pictures()), PROMPTS)
        assert got.valid.all() and (got.value.abs() <= 1).all()


def test_pickscore_scales_by_the_learned_temperature(clip_folder: Path, pictures: Pictures) -> None:
    reward = PickScore(clip_folder)
    got = reward.score(Media(pictures()), PROMPTS)
    plain = ClipScore(clip_folder).score(Media(pictures()), PROMPTS).value
    scale = reward.embedder.logit_scale
    assert scale is not None and scale.exp() > 10
    assert torch.allclose(got.value, scale.exp() * plain, rtol=1e-5)
    assert torch.allclose(got.parts["cosine"], plain)


def test_pickscore_without_a_processor_of_its_own(clip_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, tmp_path / name)
    with pytest.raises(OSError, match="CLIP-ViT-H-14"):
        PickScore(tmp_path)
    own = PickScore(tmp_path, processor=clip_folder)
    assert own.identity == PickScore(clip_folder).identity


def test_bf16_towers_leave_the_score_finer_than_bf16(clip_folder: Path, pictures: Pictures) -> None:
    pixels = pictures(1).repeat(16, 1, 1, 1)
    steps = torch.linspace(0, 0.005, 16).view(-1, 1, 1, 1)
    got = PickScore(clip_folder, dtype="bf16").score(Media(pixels + steps), ["a cat"] * 16).value
    assert got.dtype == torch.float32
    assert len(set(got.tolist())) > len(set(got.bfloat16().tolist()))


def test_hps_pads_the_longest_side(
    hps_file: Path, open_clip_config: dict[str, Any], open_clip_state: dict[str, Tensor],
    pictures: Pictures,
) -> None:  # fmt: skip
    import open_clip
    from open_clip.transform import image_transform

    reward = Hpsv2(hps_file, architecture=open_clip_config)
    model = open_clip.CLIP(**open_clip_config).eval()
    model.load_state_dict(open_clip_state)
    pixels = pictures(3, 30, 80)
    transform = image_transform(32, is_train=False, resize_mode="longest")
    inputs = torch.stack([transform(p) for p in Media(pixels).to_pil()])
    with torch.no_grad():
        image, text = model.encode_image(inputs), model.encode_text(open_clip.tokenize(PROMPTS))
    expected = torch.cosine_similarity(image, text)
    got = reward.score(Media(pixels), PROMPTS)
    assert torch.allclose(got.value, expected, atol=5e-3)
    # CLIP's own crop, which many ports use here, gives other numbers.
    shortest = image_transform(32, is_train=False, resize_mode="shortest")
    other = model.encode_image(torch.stack([shortest(p) for p in Media(pixels).to_pil()]))
    assert (torch.cosine_similarity(other, text) - expected).abs().max() > 0.02


def test_hps_versions_and_antialias_are_kept_apart(
    hps_file: Path, open_clip_config: dict[str, Any], pictures: Pictures
) -> None:
    new = Hpsv2(hps_file, architecture=open_clip_config)
    old = Hpsv2(hps_file, architecture=open_clip_config, antialias=False)
    later = Hpsv21(hps_file, architecture=open_clip_config)
    assert len({new.identity, old.identity, later.identity}) == 3
    assert old.embedder.image_tower is new.embedder.image_tower
    media = Media(pictures(3, 80, 80))
    assert not torch.allclose(new.score(media, PROMPTS).value, old.score(media, PROMPTS).value)
    assert new.score(media, PROMPTS).value.equal(later.score(media, PROMPTS).value)


def test_hps_names_keys_that_do_not_fit(
    tmp_path: Path, open_clip_config: dict[str, Any], open_clip_state: dict[str, Tensor]
) -> None:
    state = dict(open_clip_state)
    state["visual.proj"] = torch.zeros(3, 3)
    state["score_predictor.weight"] = state.pop("logit_scale")
    torch.save({"state_dict": state}, tmp_path / "bad.pt")
    said = "missing: logit_scale; unknown: score_predictor.weight; wrong shape: visual.proj"
    with pytest.raises(ValueError, match=said):
        Hpsv2(tmp_path / "bad.pt", architecture=open_clip_config)


@pytest.mark.parametrize("reward", [ClipScore, PickScore, Hpsv2, Hpsv21])
def test_without_the_hub_the_default_is_an_os_error(reward: Any) -> None:
    with pytest.raises(OSError):
        reward()


def test_published_shapes_of_vit_h(open_clip_config: dict[str, Any]) -> None:
    """Key names of the small test checkpoints are those of the real ViT-H-14."""
    import open_clip

    with torch.device("meta"):
        real = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()
        small = open_clip.CLIP(**open_clip_config).state_dict()
    layer = "visual.transformer.resblocks.31.mlp.c_fc.weight"
    assert real[layer].shape == (5120, 1280) and real["visual.proj"].shape == (1280, 1024)
    assert real["text_projection"].shape == (1024, 1024)
    assert {k for k in real if ".resblocks." not in k} == {
        k for k in small if ".resblocks." not in k
    }
    first = {k for k in real if ".resblocks.0." in k}
    assert first == {k for k in small if ".resblocks.0." in k} and len(first) == 24
    assert sum(v.numel() for v in real.values()) == pytest.approx(986.1e6, rel=1e-3)


@pytest.mark.parametrize("kind", ["clip_score", "pickscore", "hps"])
def test_contract(
    kind: str, clip_folder: Path, hps_file: Path, open_clip_config: dict[str, Any],
    pictures: Pictures,
) -> None:  # fmt: skip
    reward = {
        "clip_score": lambda: ClipScore(clip_folder),
        "pickscore": lambda: PickScore(clip_folder),
        "hps": lambda: Hpsv2(hps_file, architecture=open_clip_config),
    }[kind]()
    pixels = pictures()
    whole = reward.score(Media(pixels), PROMPTS).value
    alone = [reward.score(Media(pixels[k : k + 1]), PROMPTS[k : k + 1]).value for k in range(3)]
    assert torch.allclose(torch.cat(alone), whole, atol=1e-4)
    broken = pixels.clone()
    broken[1, 0, 0, 0] = torch.nan
    got = reward.score(Media(broken), PROMPTS)
    assert got.valid.tolist() == [True, False, True]
    leaf = pixels.requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(Media(leaf), PROMPTS).value.sum(), leaf)
    assert (gradient.abs().flatten(1).sum(1) > 0).all()
    grey = reward.score(Media(pixels.detach()[:, :1]), PROMPTS)
    assert grey.valid.all()
