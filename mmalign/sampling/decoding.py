"""Decoding with a gradient: in chunks, computed again for the backward pass, clamped as asked.

Clamping pictures to [0, 1] stops the gradient of every pixel outside. ``straight_through`` clamps
the values and lets the gradient pass as if it had not; ``none`` hands the reward values outside of
[0, 1], which it may never have seen.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmalign.protocols import Policy

Clamp = Literal["hard", "straight_through", "none"]


def decoded(policy: Policy, latents: Tensor, clamp: Clamp = "hard", chunk: int = 0) -> Tensor:
    """Pictures ``(B, 3, H, W)`` of clean latents, with the caller's grad mode.

    The decoder's activations are computed again for the backward pass, chunk by chunk, so that at
    most those of one chunk are held and never together with a reward's.

    Args:
        chunk: rows decoded together; 0 decodes all at once.

    Raises:
        ValueError: a ``clamp`` other than ``hard`` for a policy without ``pixels``; see
            :func:`check_clamp`.
    """
    check_clamp(policy, clamp)
    parts = [
        checkpoint(_pixels, policy, part, clamp, use_reentrant=False, preserve_rng_state=False)
        for part in latents.split(chunk or max(len(latents), 1))
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def check_clamp(policy: Any, clamp: Clamp) -> None:
    """Refuse to undo a clamp that is inside of the policy's own ``decode``.

    Raises:
        ValueError: names the policy and what to do.
    """
    if clamp != "hard" and not hasattr(policy, "pixels"):
        raise ValueError(
            f"clamp is {clamp!r}, but {policy.name} only has decode(), which may clamp by itself; "
            "use clamp: hard, or give the policy a method pixels(latents) that does not clamp"
        )


def _pixels(policy: Any, latents: Tensor, clamp: Clamp) -> Tensor:
    if clamp == "hard":
        return policy.decode(latents).data  # type: ignore[no-any-return]
    pixels: Tensor = policy.pixels(latents)
    if clamp == "none":
        return pixels
    return pixels + (pixels.clamp(0, 1) - pixels).detach()
