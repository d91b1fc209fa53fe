"""Held-out pairs: how many of them the model gets right, on draws that never change."""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.types import Rollout
from trainers.forward import Noising


@torch.no_grad()
def held_out_metrics(
    noising: Noising, rollout: Rollout, labels: Tensor, size: int
) -> dict[str, float]:
    """Mean loss and implicit accuracy of the noising's objective on pairs, over all draws.

    Args:
        rollout: rows ``w0, l0, w1, l1, ...`` with their ``labels``.
        size: rows of a network call.
    """
    sums: dict[str, float] = {"loss": 0.0, "implicit_accuracy": 0.0}
    count = 0
    size = max(2, size - size % 2)
    labels = labels.to(rollout.final.device)
    for draw in range(noising.draws):
        for at in range(0, len(rollout), size):
            rows = slice(at, at + size)
            batch, _ = noising.batch(rollout[rows], labels[rows], draw)
            loss, metrics = noising.objective.loss(batch)
            sums["loss"] += float(loss.sum())
            sums["implicit_accuracy"] += float(metrics["implicit_accuracy"].sum())
            count += len(loss)
    return {f"held_out/{name}": value / count for name, value in sums.items()}
