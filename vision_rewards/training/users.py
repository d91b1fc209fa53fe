"""A new annotator of an ideal-point reward from a few of their comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vision_rewards.training import losses
from vision_rewards.training.features import read_pictures
from vision_rewards.training.heads import Features, IdealPointHead
from vision_rewards.training.objective import preference
from vision_rewards.training.records import Dataset, RecordError
from vision_rewards.training.table import CellIndex, tabulate
from vision_rewards.training.trained import TrainedReward


def fit_user(
    reward: TrainedReward,
    name: str,
    data: Dataset,
    *,
    steps: int = 200,
    lr: float = 0.1,
    prior: float = 0.01,
) -> Tensor:
    """Fit the mixture of one annotator and add them to ``reward``; nothing else changes.

    PAL's few-shot step: Bradley-Terry over the annotator's pairs with every network frozen, from
    uniform weights, with ``prior`` times the squared logits against over-fitting a handful of
    pairs. ``reward.save(folder)`` keeps the new annotator.

    Args:
        data: pairs; their own ``user`` does not matter.

    Returns:
        The logits ``(K,)``.

    Raises:
        RecordError: no pairs. TypeError: the head knows no annotators.
    """
    head = reward.head
    if not isinstance(head, IdealPointHead):
        raise TypeError(f"{reward.card.name} has no annotators; train it with head ideal_point")
    if data.kind != "pairs" or not len(data):
        raise RecordError(f"an annotator is fitted to pairs, got {len(data)} {data.kind}")
    index = CellIndex(data)
    features = _features(reward, index)
    device = features.image.device
    head.to(device)
    batch = tabulate(data, index, ()).to(device)
    q = preference(batch.target)
    logits = torch.zeros(head.config.prototypes, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr)
    with torch.enable_grad():
        for _ in range(steps):
            value = head.score_with(features, logits.softmax(-1)[None]).value[batch.cells]
            each = losses.bradley_terry(value[:, 0] - value[:, 1], q)
            loss = losses.weighted_mean(each, batch.weight)
            loss = loss + prior * logits.square().sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    reward.add_user(name, logits)
    return logits.detach()


@torch.no_grad()
def _features(reward: TrainedReward, index: CellIndex, size: int = 64) -> Features:
    parts: list[Features] = []
    cells: Sequence[tuple[Path, str]] = index.cells
    for at in range(0, len(cells), size):
        paths, prompts = zip(*cells[at : at + size], strict=True)
        parts.append(reward.features(read_pictures(paths), prompts))
    texts = [p.text for p in parts if p.text is not None]
    return Features(torch.cat([p.image for p in parts]), torch.cat(texts) if texts else None)
