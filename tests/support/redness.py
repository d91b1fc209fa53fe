"""A reward with a gradient and a known best: how red a picture is."""

from __future__ import annotations

import torch


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Mean red, less the other colours."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
