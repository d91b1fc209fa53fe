"""Every reward that is declared differentiable: its gradient is there, finite and right."""

from __future__ import annotations

import pytest
import torch
from reward_builds import Subject, rewards_where
from torch import Tensor

DIFFERENTIABLE = rewards_where(lambda info: info.differentiable)
each = pytest.mark.parametrize("subject", DIFFERENTIABLE, indirect=True)


def gradient_of(subject: Subject, pixels: Tensor, row: int | None = None) -> Tensor:
    """Gradient of the sum of the valid values, or of one of them."""
    leaf = pixels.clone().requires_grad_()
    score = subject.score(leaf)
    value = score.value[score.valid].sum() if row is None else score.value[row]
    (gradient,) = torch.autograd.grad(value, leaf)
    return gradient


def inside(pixels: Tensor) -> Tensor:
    """Pictures away from black, white and flat areas, where clamps and maxima have kinks."""
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(3))
    return 0.3 + 0.3 * pixels + 0.1 * noise


@each
def test_every_picture_gets_a_gradient_of_its_own(subject: Subject) -> None:
    gradient = gradient_of(subject, inside(subject.pictures))
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().flatten(1).sum(1) > 0).all()
    if subject.info.scope == "pointwise":
        alone = gradient_of(subject, inside(subject.pictures), row=0)
        assert not alone[1:].any()
        assert torch.allclose(
            alone[0], gradient[0], rtol=1e-3, atol=1e-6 * float(alone.abs().max())
        )


@each
def test_gradient_is_the_finite_difference(subject: Subject) -> None:
    """Central differences in fp32 along the gradient and along a random mixture with it, to 2 %.

    Of several steps the best counts: large ones leave the linear range, small ones drown in
    rounding, and which are which depends on the reward.
    """
    one = subject.rows([1])
    pixels = inside(one.pictures)
    gradient = gradient_of(one, pixels)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(4))
    for direction in (gradient, gradient / gradient.norm() + 0.5 * noise / noise.norm()):
        along = direction / direction.norm()
        expected = float((gradient * along).sum())
        errors = []
        for step in (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003):
            up, down = one.values(pixels + step * along), one.values(pixels - step * along)
            errors.append(abs(float(up - down) / (2 * step) / expected - 1))
        assert min(errors) < 0.02, errors


@each
def test_gradient_survives_broken_and_flat_pictures(subject: Subject) -> None:
    """A NaN that was masked in the forward pass comes back in the backward pass if done naively."""
    pixels = inside(subject.pictures)
    pixels[0, 0, 0, 0], pixels[1], pixels[2] = torch.nan, 0.0, 1.0
    gradient = gradient_of(subject, pixels)
    assert torch.isfinite(gradient).all()
    assert not gradient[0].any() and gradient[3].any()


@each
def test_gradient_reaches_half_precision_and_grey_pictures(subject: Subject) -> None:
    two = subject.rows([0, 1])
    half, grey = inside(two.pictures).bfloat16(), inside(two.pictures)[:, :1]
    for pixels in (half, grey):
        gradient = gradient_of(two, pixels)
        assert gradient.dtype == pixels.dtype and torch.isfinite(gradient).all()
        assert gradient.any() or pixels is grey  # of which saturation is 0, however bright


@each
def test_no_graph_under_no_grad(subject: Subject) -> None:
    two = subject.rows([0, 1])
    with torch.no_grad():
        score = two.score(two.pictures.clone().requires_grad_())
    assert not score.value.requires_grad
