"""Likeness to references, and detectors of unsafe pictures under their published key names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_heads import nsfw_state
from tiny_vision import write_checker, write_classifier, write_dino
from torch import Tensor, nn

from mmalign.types import Media
from vision_rewards.safety import NsfwChecker, NsfwClassifier, NsfwClip
from vision_rewards.safety_heads import Concepts, read_nsfw_head
from vision_rewards.similarity import ClipI, DinoI

Pictures = Callable[..., Tensor]


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ViT saved as DINO's is."""
    return write_dino(tmp_path_factory.mktemp("dino"))


def gradient_reaches(reward: Any, pixels: Tensor, **more: Any) -> bool:
    """Whether every picture gets a gradient that is not zero."""
    leaf = pixels.clone().requires_grad_()
    value = reward.score(Media(leaf), [""] * len(leaf), **more).value
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return bool((gradient.abs().flatten(1).sum(1) > 0).all())


def test_a_picture_is_like_itself_and_less_like_others(
    clip_folder: Path, dino_folder: Path, pictures: Pictures
) -> None:
    pixels = pictures()
    for reward in (ClipI(clip_folder), DinoI(dino_folder)):
        same = reward.score(Media(pixels), [""] * 3, [{"reference": p} for p in pixels])
        assert torch.allclose(same.value, torch.ones(3), atol=1e-5) and (same.value <= 1).all()
        other = reward.score(Media(pixels), [""] * 3, [{"reference": p} for p in pixels.roll(1, 0)])
        assert (other.value < same.value - 1e-3).all()
        assert gradient_reaches(reward, pixels, context=[{"reference": pixels[0].flip(0)}] * 3)


def test_references_of_every_form_are_averaged(
    clip_folder: Path, tmp_path: Path, pictures: Pictures
) -> None:
    reward, pixels = ClipI(clip_folder), pictures(1)
    small = pictures(3, 24, 24)
    pil = Media(small).to_pil()
    pil[0].save(tmp_path / "a.png")
    alone = [
        reward.score(Media(pixels), [""], [{"reference": r}]).value.item()
        for r in (small[0], small[1], small[2])
    ]
    for references in (
        list(small),
        small,
        [str(tmp_path / "a.png"), pil[1], small[2]],
        [tmp_path / "a.png", small[1:]],
    ):
        got = reward.score(Media(pixels), [""], [{"reference": references}])
        assert got.value.item() == pytest.approx(sum(alone) / 3, abs=1e-5)
        assert got.parts["best"].item() == pytest.approx(max(alone), abs=1e-5)


def test_a_shared_reference_is_embedded_once(
    clip_folder: Path, tmp_path: Path, pictures: Pictures
) -> None:
    reward = ClipI(clip_folder)
    Media(pictures(1)).to_pil()[0].save(tmp_path / "a.png")
    seen: list[int] = []
    hook = reward.embedder.image_tower.register_forward_pre_hook(
        lambda _, i: seen.append(len(i[0]))
    )
    reward.score(Media(pictures(5)), [""] * 5, [{"reference": tmp_path / "a.png"}] * 5)
    hook.remove()
    assert sorted(seen) == [1, 5]


def test_what_cannot_be_read_is_unscored(
    clip_folder: Path, tmp_path: Path, pictures: Pictures
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    context = [
        {"reference": pictures(1)},
        {"reference": tmp_path / "missing.png"},
        {"reference": tmp_path / "text.png"},
        {"reference": []},
        {"reference": torch.zeros(4, 8, 8)},
    ]
    got = ClipI(clip_folder).score(Media(pictures(5)), [""] * 5, context)
    assert got.valid.tolist() == [True, False, False, False, False]
    assert "missing.png" in got.notes[1] and "could not be read" in got.notes[2]
    assert "empty" in got.notes[3] and "(4, 8, 8)" in got.notes[4]
    with pytest.raises(TypeError, match="a path, a PIL image or a tensor, got int"):
        ClipI(clip_folder).score(Media(pictures(1)), [""], [{"reference": 3}])
    with pytest.raises(ValueError, match=r"needs context\['reference'\]"):
        ClipI(clip_folder).score(Media(pictures(1)), [""])


@pytest.mark.parametrize("widths", [(768, 64, 512, 256, 1), (512, 32, 32, 1)])
def test_published_nsfw_heads(widths: tuple[int, ...]) -> None:
    state = nsfw_state(widths)
    embedding = nn.functional.normalize(torch.randn(16, widths[0]), dim=-1)
    hidden = (embedding - state["norm.mean"]) / state["norm.variance"].sqrt()
    for k in range(1, len(widths)):
        hidden = torch.relu(hidden) if k > 1 else hidden
        hidden = hidden @ state[f"linear_{k}.weight"].T + state[f"linear_{k}.bias"]
    got = read_nsfw_head(state, "a file")(embedding)
    assert torch.allclose(got, hidden.squeeze(-1), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.variance"), "missing: norm.variance"),
        (lambda s: s.update(gain=torch.ones(1)), "unknown: gain"),
        (lambda s: s.update({"linear_3.weight": torch.ones(256, 9)}), "wrong shape: linear_3"),
        (lambda s: s.pop("linear_1.weight"), "missing: linear_1.weight"),
    ],
)
def test_nsfw_heads_that_are_none(change: Any, message: str) -> None:
    state = nsfw_state((768, 64, 512, 256, 1))
    change(state)
    with pytest.raises(ValueError, match=message):
        read_nsfw_head(state, "a file")


def test_nsfw_clip(clip_folder: Path, tmp_path: Path, pictures: Pictures) -> None:
    torch.save(nsfw_state((24, 8, 12, 6, 1)), tmp_path / "head.pth")
    reward = NsfwClip(tmp_path / "head.pth", backbone=clip_folder)
    got = reward.score(Media(pictures()), [""] * 3)
    embedding = reward.embedder.image(pictures())
    assert torch.allclose(got.parts["violation"], torch.sigmoid(reward.head(embedding)))
    assert torch.allclose(got.value, 1 - got.parts["violation"], atol=1e-6)
    assert gradient_reaches(reward, pictures())
    with pytest.raises(FileNotFoundError, match=r"clip_autokeras_binary_nsfw\.pth"):
        NsfwClip()
    torch.save(nsfw_state((32, 8, 1)), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="embeddings of 32 numbers"):
        NsfwClip(tmp_path / "other.pth", backbone=clip_folder)


def test_thresholds_of_the_checker() -> None:
    """By hand: two concepts, one special-care concept that lowers their thresholds."""
    concepts = Concepts(3, concepts=2, special=1)
    concepts.load_state_dict(
        {
            "concept_embeds": torch.tensor([[2.0, 0, 0], [0, 1, 0]]),  # lengths do not matter
            "special_care_embeds": torch.tensor([[0, 0, 1.0]]),
            "concept_embeds_weights": torch.tensor([0.6, 0.605]),
            "special_care_embeds_weights": torch.tensor([0.5]),
        }
    )
    alike = torch.tensor([[0.61, 0.5, 0.0], [0.59, 0.6, 0.4], [0.0, 0.6, 0.8], [0.6004, 0, 0]])
    margin, flagged = concepts(alike)
    assert torch.allclose(margin, torch.tensor([0.01, -0.005, 0.005, 0.0004]), atol=1e-6)
    assert flagged.tolist() == [True, False, True, False]  # the last rounds to no margin


@pytest.fixture(scope="module")
def checker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random safety checker, under the key names of the published one."""
    return write_checker(tmp_path_factory.mktemp("checker"))


def test_checker_agrees_with_diffusers(checker_folder: Path, pictures: Pictures) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from safetensors.torch import load_file
    from transformers import CLIPConfig

    reward, pixels = NsfwChecker(checker_folder), pictures(16, 32, 32)
    published = StableDiffusionSafetyChecker(CLIPConfig.from_pretrained(checker_folder)).eval()
    own = {k.removeprefix("vision_model."): k for k in published.state_dict()}
    state = load_file(checker_folder / "model.safetensors")
    short = {k.replace("vision_model.", "", 2): v for k, v in state.items()}
    renamed = {name: short[k.replace("vision_model.", "")] for k, name in own.items()}
    published.load_state_dict(renamed)
    # Thresholds in the middle of the cosines, so that some pictures are flagged and some are not.
    with torch.no_grad():
        margin, _ = reward.concepts(reward.embedder.image(pixels))
        shift = margin.median() + 1e-4
        for model in (reward.concepts, published):
            model.concept_embeds_weights += shift
            model.special_care_embeds_weights += 1.0
        margin, _ = reward.concepts(reward.embedder.image(pixels))
    got = reward.score(Media(pixels), [""] * 16)
    _, flags = published(reward.embedder.preprocess(pixels), [torch.zeros(1)] * 16)
    assert got.parts["flagged"].bool().tolist() == flags
    assert 0 < sum(flags) < 16
    assert torch.allclose(got.value, torch.sigmoid(-got.parts["margin"] / 0.01))
    assert ((got.value < 0.5) == (got.parts["margin"] > 0)).all()


def test_checker_loading(checker_folder: Path, tmp_path: Path, pictures: Pictures) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    assert gradient_reaches(NsfwChecker(checker_folder, temperature=0.5), pictures())
    with pytest.raises(ValueError, match="temperature must be positive"):
        NsfwChecker(checker_folder, temperature=0)
    shutil.copytree(checker_folder, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    del state["special_care_embeds"]
    state["vision_model.extra"] = torch.ones(1)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing: special_care_embeds"):
        NsfwChecker(tmp_path)
    state["special_care_embeds"] = torch.randn(3, 24)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unknown: vision_model\.extra"):
        NsfwChecker(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        NsfwChecker(tmp_path)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random image classifier with three labels."""
    return write_classifier(tmp_path_factory.mktemp("classifier"))


def test_classifier(classifier_folder: Path, pictures: Pictures) -> None:
    reward, pixels = NsfwClassifier(classifier_folder), pictures()
    got = reward.score(Media(pixels), [""] * 3)
    inputs = reward.preprocess(pixels)
    probability = reward.model(pixel_values=inputs).logits.softmax(1)
    assert torch.allclose(got.parts["violation"], probability[:, 1], atol=1e-6)
    assert torch.allclose(got.value, 1 - probability[:, 1], atol=1e-6)
    assert gradient_reaches(reward, pixels)
    both = NsfwClassifier(classifier_folder, unsafe=["nsfw", "drawing"])
    assert torch.allclose(both.score(Media(pixels), [""] * 3).value, probability[:, 0], atol=1e-6)
    assert both.identity != reward.identity
    for labels in (["violent"], [], ["normal", "nsfw", "drawing"]):
        with pytest.raises(ValueError, match="normal, NSFW, drawing"):
            NsfwClassifier(classifier_folder, unsafe=labels)
    half = NsfwClassifier(classifier_folder, dtype="bf16").score(Media(pixels), [""] * 3)
    assert half.value.dtype == torch.float32 and torch.allclose(half.value, got.value, atol=0.05)


@pytest.mark.parametrize("reward", [ClipI, DinoI, NsfwClassifier, NsfwChecker])
def test_without_the_hub_the_default_is_an_os_error(reward: Any) -> None:
    with pytest.raises(OSError):
        reward()


def test_references_are_read_as_pictures_are(
    clip_folder: Path, tmp_path: Path, pictures: Pictures
) -> None:
    """Upright, transparent pixels over white; a bomb spoils its own sample only."""
    picture = Media(pictures(1)).to_pil()[0]
    tags = Image.Exif()
    tags[0x0112] = 3  # lies on its head
    picture.rotate(180).save(tmp_path / "turned.png", exif=tags)
    white = Image.new("RGB", picture.size, "white")
    hidden = picture.convert("RGBA")
    hidden.putalpha(0)
    reward = ClipI(clip_folder)
    for given, shown in ((tmp_path / "turned.png", picture), (hidden, white)):
        score = reward.score(Media.from_pil([shown]), [""], [{"reference": given}])
        assert score.value.item() == pytest.approx(1.0, abs=1e-5)


def test_a_huge_reference_spoils_its_own_sample_only(
    clip_folder: Path, tmp_path: Path, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (60, 60)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    context = [{"reference": tmp_path / "huge.png"}, {"reference": pictures(1)}]
    score = ClipI(clip_folder).score(Media(pictures(2)), [""] * 2, context)
    assert score.valid.tolist() == [False, True] and "huge.png" in score.notes[0]
