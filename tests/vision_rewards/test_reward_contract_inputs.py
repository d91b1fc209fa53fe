"""Every registered reward on odd pictures, files and prompts: a number or a note, never a crash."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from reward_builds import Subject, assert_well_formed, rewards_where, same

import mmalign.api
from mmalign.types import Media

every = pytest.mark.parametrize("subject", rewards_where(), indirect=True)

ODD_PROMPTS = {
    "empty": "",
    "blank": "  \n\t ",
    "long": "a very detailed photo of one red star " * 63,  # 504 words
    "chinese": "一张红色星星的照片",
    "emoji": "🌟🦊👩‍👩‍👧 ❤️",
    "braces": "{} {0} {text_prompt} {{prompt}} %s \\1 </prompt> \0",
}


# --- pictures -----------------------------------------------------------------------------------


@every
def test_a_broken_picture_does_not_spoil_its_batch(subject: Subject) -> None:
    broken = subject.pictures.clone()
    broken[1, 0, 3, 5], broken[2, :, 7] = torch.nan, torch.inf
    score, values = subject.score(broken), subject.values()
    assert score.valid.tolist() == [True, False, False, True]
    assert torch.isnan(score.value[1:3]).all() and score.notes[1] and score.notes[2]
    assert same(score.value[[0, 3]], values[[0, 3]])
    assert_well_formed(subject.score(torch.full_like(broken, torch.nan)), subject)


ODD_PICTURES = {
    "black": lambda like: torch.zeros_like(like),
    "white": lambda like: torch.ones_like(like),
    "noise": lambda like: torch.rand(like.shape, generator=torch.Generator().manual_seed(0)),
    "overshoot": lambda like: like * 1.2 - 0.1,  # what a decoder may put out
    "1x1": lambda like: like[..., :1, :1],
    "2x3": lambda like: like[..., :2, :3],
    "strip": lambda like: like[..., :1, :],
}


@every
@pytest.mark.parametrize("kind", ODD_PICTURES)
def test_odd_pictures(subject: Subject, kind: str) -> None:
    two = subject.rows([0, 1])
    assert_well_formed(two.score(ODD_PICTURES[kind](two.pictures)), two)


@every
def test_a_large_picture(subject: Subject) -> None:
    one = subject.rows([0])
    large = torch.nn.functional.interpolate(one.pictures, (300, 500))
    assert_well_formed(one.score(large), one)


@every
def test_grey_is_three_equal_channels(subject: Subject) -> None:
    grey = subject.pictures.mean(1, keepdim=True)
    score = subject.score(grey)
    assert_well_formed(score, subject)
    assert same(score.value, subject.values(grey.expand(-1, 3, -1, -1)))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pictures(subject: Subject, dtype: torch.dtype) -> None:
    two = subject.rows([0, 1])
    half = two.pictures.to(dtype)
    value = two.values(half)
    assert value.dtype == torch.float32 and same(value, two.values(half.float()))


@every
def test_memory_layout_does_not_matter(subject: Subject) -> None:
    mirrored = subject.pictures.to(memory_format=torch.channels_last)
    assert same(subject.values(mirrored), subject.values())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One picture as files of every mode."""
    folder = tmp_path_factory.mktemp("modes")
    ramp = torch.linspace(0, 1, 48).expand(3, 48, 48) * torch.tensor([1, 0.5, 0.8])[:, None, None]
    picture = Media(ramp[None]).to_pil()[0]
    grey = Image.fromarray((ramp[0] * 65535).numpy().astype("uint16"))
    made = {
        "rgb.png": picture,
        "rgba.png": picture.convert("RGBA"),
        "palette.png": picture.quantize(16),
        "deep.png": grey,
        "cmyk.jpg": picture.convert("CMYK"),
        "one_bit.png": picture.convert("1"),
    }
    for name, image in made.items():
        image.save(folder / name)
    return [folder / name for name in made]


@every
def test_files_of_every_mode(subject: Subject, files: list[Path]) -> None:
    rows = [0] * len(files)
    many = subject.rows(rows)
    score = mmalign.api.score(files, list(many.prompts), subject.reward, context=many.context)
    assert_well_formed(score, many)
    with Image.open(files[0]) as image:
        plain = Media.from_pil([image]).data
    assert same(score.value[:1], subject.rows([0]).values(plain))
    assert same(score.value[:1], score.value[1:2])  # a full alpha channel changes nothing
    if score.valid[0]:
        assert score.valid.all(), score.notes


# --- prompts ------------------------------------------------------------------------------------


@every
def test_odd_prompts(subject: Subject) -> None:
    for kinds in (["empty", "blank", "long", "chinese"], ["emoji", "braces", "long", "empty"]):
        score = subject.score(prompts=[ODD_PROMPTS[k] for k in kinds])
        assert_well_formed(score, subject)
        if "prompt" not in subject.info.needs:
            assert score.valid.all()


@every
def test_an_odd_prompt_does_not_spoil_its_batch(subject: Subject) -> None:
    prompts = list(subject.prompts)
    prompts[1], prompts[2] = ODD_PROMPTS["long"], ODD_PROMPTS["emoji"]
    odd = replace(subject, prompts=tuple(prompts)).values()
    assert same(odd[[0, 3]], subject.values()[[0, 3]])
