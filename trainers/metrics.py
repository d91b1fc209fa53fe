"""What a step reports: reward, advantage, ratio, KL and gradient statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.types import Score
from trainers.advantages import group_statistics, zero_spread_share
from trainers.update import Totals


@dataclass(frozen=True)
class Work:
    """What a training step did, for the loop's books.

    Attributes:
        results: totals and gradient norm of each update.
        metrics: what the step reports beside them.
        nfe: network evaluations before the updates, over all processes.
        sampled, scored, end: when samples, their scores and the updates were there.
    """

    results: list[tuple[Totals, float]]
    metrics: dict[str, float]
    nfe: int
    sampled: float
    scored: float
    end: float


def score_metrics(
    score: Score, groups: Tensor, advantage: Tensor | None = None
) -> dict[str, float]:
    """Reward mean, deviations and parts over the scored samples of a step.

    ``advantage`` where there is any, whose size and absence are reported too.
    """
    values = score.value[score.valid]
    metrics = {"reward/valid": float(score.valid.float().mean())}
    if len(values):
        _, spread = group_statistics(score.value, score.valid, groups)
        metrics["reward/mean"] = float(values.mean())
        metrics["reward/std"] = float(values.std(unbiased=False))
        metrics["reward/group_std"] = float(spread[score.valid].mean())
        if advantage is not None:
            metrics["advantage/abs_mean"] = float(advantage[score.valid].abs().mean())
    for name, part in score.parts.items():
        known = part[torch.isfinite(part)]
        if len(known):
            metrics[f"reward/part/{name}"] = float(known.mean())
    if advantage is not None:
        metrics["zero_spread"] = zero_spread_share(score.value, score.valid, groups)
    return metrics


def update_metrics(results: list[tuple[Totals, float]], accelerator: Any) -> dict[str, float]:
    """Means over the samples, steps and processes of all updates of one rollout."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    deviation = 0.0
    for totals, _ in _all(results, accelerator):
        deviation = max(deviation, totals.ratio_deviation)
        for name in totals.sums:
            sums[name] = sums.get(name, 0.0) + totals.sums[name]
            counts[name] = counts.get(name, 0.0) + totals.counts[name]
    means = {n: sums[n] / counts[n] for n in sums if counts[n]}
    metrics = {_NAMES.get(n, n): v for n, v in means.items() if "/" not in n}
    metrics |= {f"by_step/{n}": v for n, v in means.items() if "/" in n}
    metrics["ratio/max_deviation"] = deviation
    norms = [norm for _, norm in results if math.isfinite(norm)]  # others were skipped
    # Without any update (a critic's warm-up) it is 0; where all of them were skipped, unknown.
    metrics["grad_norm"] = sum(norms) / len(norms) if norms else (math.nan if results else 0.0)
    return metrics


_NAMES = {"ratio": "ratio/mean", "clip": "clip_fraction"}


def _all(results: list[tuple[Totals, float]], accelerator: Any) -> list[tuple[Totals, float]]:
    if accelerator.num_processes == 1:
        return results
    from accelerate.utils import gather_object

    return list(gather_object(results))
