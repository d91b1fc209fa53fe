"""The harmonic mean of likeness and fidelity: its limits, its parts, its references."""

from __future__ import annotations

import random

import pytest
import torch

from mmalign.shapes import parse, render, sample_scene
from mmalign.shapes.subject import SUBJECTS, subject_pictures, subject_scene
from mmalign.types import Media
from vision_rewards.factory import load_reward
from vision_rewards.similarity import ClipI, reference_pictures
from vision_rewards.subject import LambdaHarmonic, harmonic, without_token

SHIPPED = {"reward": "clip_i", "checkpoint": "shipped:shapes-clip"}
SOURCE = "shapes:striped_star"


def drawn(prompts: list[str], subject: bool = False, start: int = 0) -> Media:
    scenes = []
    for k, text in enumerate(prompts):
        rng, spec = random.Random(start + k), parse(text)
        star = SUBJECTS["striped_star"]
        scenes.append(subject_scene(star, rng, spec) if subject else sample_scene(spec, rng))
    return Media.from_pil([render(scene) for scene in scenes])


def reward(**options) -> LambdaHarmonic:
    found = load_reward({"reward": "lambda_harmonic", "references": SOURCE, "image": SHIPPED,
                         "text": "shapes_clip", **options})  # fmt: skip
    assert isinstance(found, LambdaHarmonic)
    return found


def test_the_mean_by_hand_and_at_its_ends():
    a, b = torch.tensor([0.5, 0.2, 0.9]).double(), torch.tensor([0.25, 0.8, 0.9]).double()
    assert harmonic(a, b, 1.0).equal(a) and harmonic(a, b, 0.0).equal(b)
    torch.testing.assert_close(harmonic(a, b, 0.5), 2 / (1 / a + 1 / b))
    torch.testing.assert_close(harmonic(a, b, 0.3), 1 / (0.3 / a + 0.7 / b))
    torch.testing.assert_close(harmonic(a, b, 0.3), harmonic(b, a, 0.7))
    torch.testing.assert_close(harmonic(a, a, 0.3), a)
    assert bool((harmonic(a + 0.05, b, 0.3) > harmonic(a, b, 0.3)).all())
    assert bool((harmonic(a, b + 0.05, 0.3) > harmonic(a, b, 0.3)).all())


def test_nothing_makes_up_for_an_absence():
    a = torch.tensor([0.0, 0.7, 0.0], requires_grad=True)
    b = torch.tensor([0.9, 0.0, 0.0])
    found = harmonic(a, b, 0.4)
    assert found.tolist() == [0, 0, 0]
    (slope,) = torch.autograd.grad(found.sum(), a)
    assert bool(slope.isfinite().all()) and float(slope[0]) == pytest.approx(1 / 0.4)


def test_the_token_is_taken_out():
    assert without_token("a photo of a sks star above a sksy circle", "sks") == (
        "a photo of a star above a sksy circle"
    )
    assert without_token("a [V] dog, a [V].", "[V]") == "a dog, a ."
    assert without_token("a  sks  dog", "") == "a  sks  dog"


def test_parts_are_those_of_the_two_rewards():
    media = drawn(["a photo of a star", "a photo of a red circle"])
    said = ["a photo of a sks star", "a photo of a sks star and a red circle"]
    score = reward(balance=0.3).score(media, said)
    image = load_reward({**SHIPPED, "references": SOURCE}).score(media, ["", ""])
    text = load_reward("shapes_clip").score(media, [without_token(p, "sks") for p in said])
    torch.testing.assert_close(score.parts["likeness"], (image.value + 1) / 2)
    torch.testing.assert_close(score.parts["fidelity"], (text.value + 1) / 2)
    torch.testing.assert_close(
        score.value, 1 / (0.3 / score.parts["likeness"] + 0.7 / score.parts["fidelity"])
    )


def test_it_tells_the_subject_from_others_of_its_shape():
    """On new pictures, by the shipped model: more likeness, and more reward where that counts."""
    star = ["a photo of a star"] * 12
    own, other = drawn(star, subject=True, start=100), drawn(star, start=100)
    judge = reward(balance=0.7)
    ours, theirs = (judge.score(m, ["a photo of a sks star"] * 12) for m in (own, other))
    assert bool((ours.parts["likeness"] > theirs.parts["likeness"].max()).all())
    assert float((ours.value[:, None] > theirs.value[None]).float().mean()) > 0.6


def test_gradients_reach_the_pixels():
    pixels = drawn(["a photo of a star"]).data.requires_grad_()
    judge = reward()
    assert judge.info.differentiable and judge.info.needs == ("prompt",)
    judge.score(Media(pixels), ["a photo of a sks star"]).value.sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().sum()) > 0


def test_references_in_every_form(tmp_path):
    pictures = subject_pictures(SOURCE)
    for k, picture in enumerate(pictures):
        picture.save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    given = reference_pictures(SOURCE)
    for source in (str(tmp_path), [tmp_path / f"{k}.png" for k in range(4)], pictures,
                   Media.from_pil(pictures).data):  # fmt: skip
        assert all(a.equal(b) for a, b in zip(reference_pictures(source), given, strict=True))
    # Its own references serve samples without any; a context's come first.
    clip = load_reward({**SHIPPED, "references": str(tmp_path)})
    assert isinstance(clip, ClipI) and clip.info.needs == ()
    media = drawn(["a photo of a star"])
    free = load_reward(SHIPPED)
    known = free.score(media, [""], [{"reference": pictures}]).value
    torch.testing.assert_close(clip.score(media, [""]).value, known)
    itself = clip.score(media, [""], [{"reference": media.data}]).value
    assert float(itself) == pytest.approx(1, abs=1e-5)
    names = {load_reward({**SHIPPED, "references": s}).identity for s in (SOURCE, str(tmp_path))}
    assert names == {clip.identity} and clip.identity != free.identity
    assert reward().identity != reward(balance=0.6).identity != reward(token="xyz").identity


def test_without_references_of_its_own_it_asks_for_them():
    judge = reward(references=None)
    media = drawn(["a photo of a star"])
    assert judge.info.needs == ("prompt", "reference")
    with pytest.raises(ValueError, match=r"context\['reference'\]"):
        judge.score(media, ["a photo of a sks star"])
    given = judge.score(media, ["a photo of a sks star"], [{"reference": subject_pictures(SOURCE)}])
    own = reward().score(media, ["a photo of a sks star"])
    torch.testing.assert_close(given.value, own.value)


def test_what_cannot_be_combined(tmp_path):
    for words, options in {
        r"balance must lie in \[0, 1\]": {"balance": 1.5},
        "text='shapes_aesthetic' has the open range": {"text": "shapes_aesthetic"},
        "image='shapes_clip' is a pointwise reward of prompt": {"image": "shapes_clip"},
        "text='shapes_artifact' is a pointwise reward of pixels": {"text": "shapes_artifact"},
    }.items():
        with pytest.raises(ValueError, match=words):
            reward(**options)
    with pytest.raises(FileNotFoundError, match="holds no picture of a subject"):
        reward(references=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="shapes-clip"):
        load_reward({"reward": "clip_i", "checkpoint": "shipped:shapes-clips"})
