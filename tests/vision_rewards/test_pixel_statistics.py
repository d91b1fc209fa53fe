"""Pixel statistics: closed forms, gradients, videos, what artefacts do to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmalign.types import Media
from vision_rewards.factory import load_reward
from vision_rewards.pixel_statistics import (
    Clipping,
    Colorfulness,
    Contrast,
    GridEnergy,
    PixelStatistic,
    Saturation,
    Sharpness,
    luma,
)

NAMES = ["sharpness", "saturation", "colorfulness", "contrast", "grid_energy", "clipping"]


def value(reward: PixelStatistic, pixels: Tensor) -> float:
    score = reward.score(Media(pixels[None]), [""])
    assert score.valid.all(), score.notes
    return score.value.item()


def flat(*colour: float, size: int = 16) -> Tensor:
    return torch.tensor(colour).view(3, 1, 1).expand(3, size, size).contiguous()


def stripes(period: int, size: int = 32, low: float = 0.0) -> Tensor:
    """Vertical stripes, as wide as the gaps between them."""
    bright = (torch.arange(size) % period < period // 2).float() * (1 - low) + low
    return bright.expand(3, size, size).contiguous()


def chequerboard(size: int = 32, low: float = 0.0) -> Tensor:
    row = torch.arange(size)
    bright = ((row[:, None] + row[None]) % 2).float() * (1 - low) + low
    return bright.expand(3, size, size).contiguous()


def photograph(size: int = 64, seed: int = 0) -> Tensor:
    """Coloured noise whose amplitude falls as 1/f, as in natural pictures."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(size)] * 2, indexing="ij"))
    spectrum = torch.fft.fft2(torch.randn(3, size, size, generator=generator))
    picture = torch.fft.ifft2(spectrum / frequency.clamp_min(1 / size)).real
    return (0.5 + 0.15 * picture / picture.std()).clamp(0, 1)


# --- closed forms -------------------------------------------------------------------------------


def test_luma_of_the_primaries() -> None:
    primaries = torch.eye(3).view(3, 3, 1, 1)
    assert luma(primaries).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])
    assert luma(torch.ones(1, 3, 1, 1)).item() == pytest.approx(1.0)


def test_sharpness() -> None:
    assert value(Sharpness(), flat(0.2, 0.4, 0.6)) == pytest.approx(0.0, abs=1e-6)
    ramp = torch.linspace(0, 1, 20).expand(3, 20, 20)
    assert value(Sharpness(), ramp) == pytest.approx(0.0, abs=1e-4)
    # Every inner pixel differs from its four neighbours by one: the Laplacian is +4 or -4.
    assert value(Sharpness(), chequerboard()) == pytest.approx((4 * 255) ** 2, rel=1e-5)
    grey = (128 + 8 * chequerboard()) / 255
    assert value(Sharpness(), grey) == pytest.approx((4 * 8) ** 2, rel=1e-4)


def test_saturation() -> None:
    assert value(Saturation(), flat(1.0, 0.0, 0.0)) == 1.0
    assert value(Saturation(), flat(0.5, 0.25, 0.4)) == pytest.approx(0.5)
    assert value(Saturation(), flat(0.3, 0.3, 0.3)) == 0.0
    assert value(Saturation(), flat(0.0, 0.0, 0.0)) == 0.0
    half = torch.cat([flat(0.0, 1.0, 0.0), flat(1.0, 1.0, 1.0)], 2)
    assert value(Saturation(), half) == pytest.approx(0.5)


def test_colorfulness() -> None:
    assert value(Colorfulness(), flat(0.4, 0.4, 0.4)) == pytest.approx(0.0, abs=1e-4)
    # One colour: no spread, rg = 255, yb = 127.5.
    red = value(Colorfulness(), flat(1.0, 0.0, 0.0))
    assert red == pytest.approx(0.3 * math.hypot(255, 127.5), rel=1e-6)
    # Half red, half green: rg = +-255 with mean 0, yb = 127.5 everywhere.
    half = torch.cat([flat(1.0, 0.0, 0.0), flat(0.0, 1.0, 0.0)], 2)
    assert value(Colorfulness(), half) == pytest.approx(255 + 0.3 * 127.5, rel=1e-6)


def test_contrast() -> None:
    assert value(Contrast(), flat(0.7, 0.1, 0.2)) == pytest.approx(0.0, abs=1e-6)
    assert value(Contrast(), chequerboard()) == pytest.approx(0.5, rel=1e-6)
    assert value(Contrast(), stripes(4, low=0.6)) == pytest.approx(0.2, rel=1e-5)


def test_clipping() -> None:
    half = torch.cat([flat(1.0, 1.0, 1.0), flat(1.0, 0.5, 1.0)], 2)
    assert value(Clipping(), half) == -0.5
    assert value(Clipping(), flat(0.0, 0.0, 0.0)) == -1.0
    assert value(Clipping(), flat(1.0, 0.0, 0.0)) == 0.0  # a pure colour is not clipped
    assert value(Clipping(), flat(254 / 255, 254 / 255, 254 / 255)) == 0.0


@pytest.mark.parametrize("period", [2, 4, 8])
def test_a_grid_has_all_its_energy_on_the_grid(period: int) -> None:
    assert value(GridEnergy(), stripes(period)) == pytest.approx(-1.0, abs=1e-4)
    assert value(GridEnergy(), stripes(period, size=35).mT) == pytest.approx(-1.0, abs=1e-4)
    assert value(GridEnergy(period=period), stripes(2 * period)) > -0.5


def test_grid_energy_of_chequerboards_waves_and_nothing() -> None:
    assert value(GridEnergy(), chequerboard(low=0.9)) == pytest.approx(-1.0, abs=1e-4)
    assert value(GridEnergy(), flat(0.3, 0.6, 0.9)) == pytest.approx(0.0, abs=1e-3)
    wave = 0.5 + 0.4 * torch.cos(2 * torch.pi * 5 * torch.arange(32) / 32)  # 5/32 is not k/8
    assert value(GridEnergy(), wave.expand(3, 32, 32)) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("period", [4, 8])
def test_grid_energy_of_white_noise(period: int) -> None:
    noise = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    score = GridEnergy(period=period).score(Media(noise), [""] * 64)
    assert score.value.mean().item() == pytest.approx(-((period / 64) ** 2), rel=0.1)


# --- artefacts ----------------------------------------------------------------------------------


def test_artefacts_move_the_probes() -> None:
    clean = photograph()
    blurred = torch.nn.functional.avg_pool2d(clean, 5, 1, 2)
    assert value(Sharpness(), blurred) < 0.3 * value(Sharpness(), clean)
    seams = clean.clone()
    seams[:, ::8] += 0.05
    seams[:, :, ::8] += 0.05
    board = clean + 0.03 * (chequerboard(64) - 0.5)
    grid = value(GridEnergy(), clean)
    assert value(GridEnergy(), board) < 2 * grid and value(GridEnergy(), seams) < 2 * grid
    burnt = (0.5 + 3 * (clean - 0.5)).clamp(0, 1)
    for probe in (Contrast(), Saturation(), Colorfulness()):
        assert value(probe, burnt) > 1.3 * value(probe, clean)
    assert value(Clipping(), burnt) < value(Clipping(), clean)


# --- shared behaviour ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[:-1])
def test_gradients_agree_with_differences(name: str) -> None:
    reward = load_reward(name)
    pixels = photograph(16, seed=3)[None]
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
    pixels.requires_grad_()
    reward.score(Media(pixels), [""]).value.sum().backward()
    slope = (pixels.grad * direction).sum().item()

    def at(step: float) -> float:
        return reward.score(Media(pixels.detach() + step * direction), [""]).value.item()

    assert slope == pytest.approx((at(1e-3) - at(-1e-3)) / 2e-3, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_gradients_of_flat_pictures_are_finite(name: str, level: float) -> None:
    pixels = torch.full((1, 3, 16, 16), level, requires_grad=True)
    load_reward(name).score(Media(pixels), [""]).value.sum().backward()
    assert torch.isfinite(pixels.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_of_a_video_the_frames_are_averaged(name: str) -> None:
    reward = load_reward(name)
    frames = torch.stack([photograph(16, seed=i) * (0.4 + 0.2 * i) for i in range(4)])
    alone = reward.score(Media(frames), [""] * 4).value
    together = reward.score(Media(frames.view(2, 2, 3, 16, 16)), [""] * 2).value
    assert together.tolist() == pytest.approx(alone.view(2, 2).mean(1).tolist(), rel=1e-5)


@pytest.mark.parametrize(("name", "side"), [("sharpness", 2), ("grid_energy", 15)])
def test_pictures_too_small_to_measure_are_unscored(name: str, side: int) -> None:
    score = load_reward(name).score(Media(torch.rand(2, 3, side, 40)), [""] * 2)
    assert not score.valid.any() and f"the picture has {side}" in score.notes[1]
    assert load_reward(name).score(Media(torch.rand(1, 3, side + 1, 40)), [""]).valid.all()


@pytest.mark.parametrize("name", ["saturation", "colorfulness", "contrast", "clipping"])
def test_a_single_pixel_is_measured(name: str) -> None:
    assert load_reward(name).score(Media(torch.rand(1, 3, 1, 1)), [""]).valid.all()


def test_the_period_is_part_of_the_identity() -> None:
    assert GridEnergy(period=4).identity != GridEnergy().identity
    with pytest.raises(ValueError, match="at least 2 pixels, got 1"):
        GridEnergy(period=1)
