"""Pairs on a draw of the forward process, as objectives of preferences see them."""

from __future__ import annotations

import torch

from mmalign.sampling import process
from trainers.objective import ForwardBatch
from trainers.preferences.pairwise import ANCHOR


def batch(same: bool = False, kind: str = "flow", **changes) -> ForwardBatch:
    """Three pairs of six latents, winner first, level and noise shared in a pair."""
    generator = torch.Generator().manual_seed(4)
    clean = torch.randn(6, 1, 2, 3, generator=generator)
    velocity, reference = torch.randn(2, 6, 1, 2, 3, generator=generator).unbind(0)
    noise = torch.randn(3, 1, 2, 3, generator=generator).repeat_interleave(2, 0)
    sigma = torch.tensor([0.1, 0.5, 0.9]).repeat_interleave(2)
    values = {
        "clean": clean, "noise": noise, "sigma": sigma,
        "noised": process.noised(kind, clean, noise, sigma), "velocity": velocity.requires_grad_(),
        "advantage": torch.tensor([1.0, -1.0] * 3), "parameterisation": kind,
        "others": dict.fromkeys(("reference", ANCHOR), velocity.detach() if same else reference),
    }  # fmt: skip
    return ForwardBatch(**{**values, **changes})


def gradient(loss: torch.Tensor, b: ForwardBatch) -> torch.Tensor:
    """Of the sum of losses, with respect to the predictions."""
    return torch.autograd.grad(loss.sum(), b.velocity)[0]
