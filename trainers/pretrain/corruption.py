"""Synthetic artefacts: grids, noise, colour bleeding, broken and warped outlines, ghosts.

Each takes pictures ``(B, 3, H, W)`` in [0, 1] and a generator and returns broken ones. Strengths
are drawn per picture, from plainly visible upwards, because a label must be true.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Corruption = Callable[[Tensor, torch.Generator], Tensor]


def grid(pixels: Tensor, g: torch.Generator) -> Tensor:
    """A periodic pattern of 2 to 8 pixels, stripes or a checkerboard: decoder and patch grids."""
    count, _, height, width = pixels.shape
    period = 2.0 ** _uniform(g, count, 1.0, 3.0).round()
    phase = _uniform(g, count, 0.0, 6.28)
    y = torch.arange(height).view(1, 1, -1, 1) / period * 6.2832
    x = torch.arange(width).view(1, 1, 1, -1) / period * 6.2832
    stripes, lattice = torch.sin(x + y * _sign(g, count) + phase), torch.sin(x + phase) * y.cos()
    wave = torch.where(_uniform(g, count, 0, 1) < 0.5, stripes, lattice)
    return (pixels + _uniform(g, count, 0.06, 0.2) * wave.sign()).clamp(0, 1)


def noise(pixels: Tensor, g: torch.Generator) -> Tensor:
    """Gaussian noise of deviation 0.05 to 0.2, or up to 8 % of salt and pepper."""
    count = len(pixels)
    gauss = pixels + _uniform(g, count, 0.05, 0.2) * _normal(pixels, g)
    hit = torch.rand(count, 1, *pixels.shape[2:], generator=g) < _uniform(g, count, 0.01, 0.08)
    salt = torch.where(hit, (_normal(pixels, g) > 0).float(), pixels)
    return torch.where(_uniform(g, count, 0, 1) < 0.6, gauss, salt).clamp(0, 1)


def bleeding(pixels: Tensor, g: torch.Generator) -> Tensor:
    """Colour runs out of the outlines: chroma blurred or displaced while brightness stays."""
    count = len(pixels)
    grey = pixels.mean(1, keepdim=True)
    chroma = pixels - grey
    wide = F.avg_pool2d(F.pad(chroma, (5, 5, 5, 5), mode="replicate"), 11, 1)
    moved = torch.stack([torch.roll(c, s, (1, 2)) for c, s in zip(chroma, _shifts(g, count),
                                                                  strict=True)])  # fmt: skip
    run = torch.where(_uniform(g, count, 0, 1) < 0.5, wide * 1.6, moved)
    share = _uniform(g, count, 0.7, 1.0)
    return (grey + chroma * (1 - share) + run * share).clamp(0, 1)


def warp(pixels: Tensor, g: torch.Generator) -> Tensor:
    """Outlines bent by a smooth displacement of 2 to 5 pixels: shapes that are no shape."""
    count, _, height, width = pixels.shape
    cells = int(torch.randint(6, 11, (1,), generator=g))
    coarse = torch.randn(count, 2, cells, cells, generator=g)
    offset = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    strength = _uniform(g, count, 2.0, 5.0) * 2 / width
    base = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(pixels.shape), False)
    at = base + (strength * offset).permute(0, 2, 3, 1)
    return F.grid_sample(pixels, at, padding_mode="border", align_corners=False)


def broken(pixels: Tensor, g: torch.Generator) -> Tensor:
    """Bites out of the outlines: three to seven discs on edges, filled with what is nearby."""
    count, _, height, width = pixels.shape
    chroma = pixels.amax(1) - pixels.amin(1)
    edge = F.max_pool2d(chroma[:, None], 3, 1, 1)[:, 0] - chroma
    weight = (edge.flatten(1) > 0.15).float() + 1e-6
    centres = torch.multinomial(weight, 7, generator=g)
    used = torch.arange(7) < _uniform(g, count, 3, 8).view(-1, 1)
    radius = 1.5 + 2.5 * torch.rand(count, 7, generator=g)
    y, x = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    cy, cx = (centres // width).view(count, 7, 1, 1), (centres % width).view(count, 7, 1, 1)
    inside = ((y - cy) ** 2 + (x - cx) ** 2 < radius.view(count, 7, 1, 1) ** 2) & used.view(
        count, 7, 1, 1
    )
    filler = torch.stack([torch.roll(p, s, (1, 2)) for p, s in zip(pixels, _shifts(g, count, 6),
                                                                   strict=True)])  # fmt: skip
    return torch.where(inside.any(1, keepdim=True), filler, pixels)


def ghost(pixels: Tensor, g: torch.Generator) -> Tensor:
    """A faint second copy of the picture, displaced: what a few large sampling steps leave."""
    count = len(pixels)
    moved = torch.stack([torch.roll(p, s, (1, 2)) for p, s in zip(pixels, _shifts(g, count),
                                                                  strict=True)])  # fmt: skip
    share = _uniform(g, count, 0.25, 0.5)
    return pixels * (1 - share) + moved * share


CORRUPTIONS: dict[str, Corruption] = {
    "grid": grid, "noise": noise, "bleeding": bleeding, "warp": warp, "broken": broken,
    "ghost": ghost,
}  # fmt: skip


def _uniform(g: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, 1, 1, 1, generator=g)


def _normal(like: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=g)


def _sign(g: torch.Generator, count: int) -> Tensor:
    return (_uniform(g, count, -1, 2)).sign()


def _shifts(g: torch.Generator, count: int, least: int = 3) -> list[tuple[int, int]]:
    """One displacement of ``least`` to ``least + 3`` pixels a picture, in any diagonal."""
    size = torch.randint(least, least + 4, (count, 2), generator=g)
    sign = torch.randint(0, 2, (count, 2), generator=g) * 2 - 1
    return [(int(a), int(b)) for a, b in (size * sign).tolist()]
