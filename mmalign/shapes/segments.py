r"""A soft segmentation of the shapes world by colour: what a picture shows where, with a gradient.

Objects have eight saturated colours and backgrounds are nearly grey, so that for a pixel :math:`p`
in [0, 1] the distance to a colour :math:`q_k`, and for the background to the grey of equal mean,
say what it belongs to:

.. math:: z_k = -|p - q_k|^2 / T, \qquad z_0 = -|p - \bar p|^2 / T, \qquad P = \mathrm{softmax}(z).

Nothing has to be trained or shipped for it. Photographs have no such colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.shapes.grammar import COLORS

UNKNOWN = -1  # the label of pixels that belong to nothing clearly: outlines
GREY = 0.5  # how the background is painted
CLASSES = 1 + len(COLORS)


@dataclass(frozen=True)
class Segments:
    """The segmentation. ``temperature`` is :math:`T`."""

    temperature: float = 0.02

    @property
    def identity(self) -> str:
        """For results that rest on it."""
        return f"segments of colour, T {self.temperature}"

    def logits(self, pixels: Tensor) -> Tensor:
        """``z`` ``(B, 9, H, W)`` fp32 of pictures ``(B, 3, H, W)``: background, then colours."""
        pixels = pixels.float()
        grey = (pixels - pixels.mean(1, keepdim=True)).square().sum(1, keepdim=True)
        colors = palette(pixels)[1:].view(1, -1, 3, 1, 1)
        away = (pixels.unsqueeze(1) - colors).square().sum(2)
        return -torch.cat([grey, away], 1) / self.temperature

    def labels(self, pixels: Tensor) -> Tensor:
        """The class of each pixel, ``(B, H, W)`` int64; ``UNKNOWN`` where none has half of it."""
        share, label = self.logits(pixels).softmax(1).max(1)
        return torch.where(share < 0.5, UNKNOWN, label)

    def paint(self, labels: Tensor) -> Tensor:
        """The map as a picture ``(B, 3, H, W)``: pure colours on grey, as a ControlNet sees it."""
        rows = palette(labels)[labels.clamp_min(0)]
        return rows.permute(0, 3, 1, 2).contiguous()


def palette(like: Tensor) -> Tensor:
    """The colour of each class, ``(9, 3)`` fp32 in [0, 1], on the device of ``like``."""
    rows = [(GREY, GREY, GREY), *(tuple(c / 255 for c in rgb) for rgb in COLORS.values())]
    return torch.tensor(rows, device=like.device)
