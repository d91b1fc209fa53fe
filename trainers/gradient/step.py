"""A training step of a reward-gradient objective: no rollout, scores or advantages beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmalign.types import Rollout
from trainers.gradient.update import GradientUpdater
from trainers.metrics import Work, score_metrics
from trainers.rollouts import Rollouts

Updates = Callable[[Rollout, Tensor, Tensor, Tensor], list[Any]]


def follow(rollouts: Rollouts, update: GradientUpdater, updates: Updates, step: int) -> Work:
    """Sample, score and learn from the prompts of ``step``, in one.

    Args:
        updates: the loop's, which shares rows between processes and counts.
    """
    rollout, _ = rollouts.sample(step)
    began = time.perf_counter()
    config = rollouts.config
    groups = torch.arange(config.prompts_per_step).repeat_interleave(config.images_per_prompt)
    every = torch.ones(config.batch, dtype=torch.bool)
    results = updates(rollout, every.float(), every, groups)
    end = time.perf_counter()
    metrics = {}
    if update.score is not None and update.groups is not None:
        metrics = score_metrics(update.score, update.groups)
    return Work(results, metrics | rollouts.metrics(rollout), 0, began, began, end)


__all__ = ["follow"]
