"""From scores to advantages. Pure functions: ``(scores, groups, options) -> (B,)`` or ``(B, S)``.

Unscored samples (``valid == False``) get advantage 0 and take no part in any mean or deviation.
A group without spread gets 0 throughout.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from vision_rewards.compositions.groups import pareto_fronts

Std = Literal["group", "global", "none"]


def group_statistics(values: Tensor, valid: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population deviation of each sample's group, both ``(B,)``, over valid samples."""
    _, index = torch.unique(groups.to(values.device), return_inverse=True)
    count = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=values.device)
    weight = valid.double()
    safe = torch.where(valid, values, 0.0).double()
    count = count.index_add(0, index, weight).clamp_min(1.0)
    mean = torch.zeros_like(count).index_add(0, index, safe) / count
    deviation = torch.where(valid, safe - mean[index], 0.0)
    variance = torch.zeros_like(count).index_add(0, index, deviation.square()) / count
    return mean[index].float(), variance.sqrt()[index].float()


def group_advantage(
    values: Tensor, valid: Tensor, groups: Tensor, std: Std = "global", eps: float = 1e-4
) -> Tensor:
    """``(r - mean_group) / (std + eps)``, ``(B,)`` (Flow-GRPO, 2505.05470, eq. 4).

    The mean is the group's. ``std="global"`` divides by the deviation of the *whole batch of raw
    rewards*, Flow-GRPO's default: groups with little spread then count little. ``group`` divides
    by each group's own; ``none`` only centres.
    """
    mean, spread = group_statistics(values, valid, groups)
    centred = torch.where(valid, values - mean, 0.0)
    if std == "none":
        return centred
    if std == "group":
        # Without spread, rounding is all there is to divide by.
        return torch.where(spread > 1e-6, centred / (spread + eps), 0.0)
    scored = values[valid]
    if len(scored) < 2:
        return torch.zeros_like(values)
    return centred / (scored.std(unbiased=False) + eps)


def step_advantage(
    values: Tensor, valid: Tensor, groups: Tensor, std: Std = "global", eps: float = 1e-4
) -> Tensor:
    """:func:`group_advantage` of each column of ``values`` ``(B, S)`` by itself: ``(B, S)``."""
    columns = zip(values.unbind(1), valid.unbind(1), strict=True)
    return torch.stack([group_advantage(v, ok, groups, std, eps) for v, ok in columns], 1)


class PromptTracker:
    """Per-prompt statistics over past steps (DDPO, 2305.13301).

    Keeps the last ``size`` rewards of each prompt; below ``min_count`` of them the batch's
    statistics are used.
    """

    def __init__(self, size: int = 16, min_count: int = 16, eps: float = 1e-6) -> None:
        self.size, self.min_count, self.eps = size, min_count, eps
        self._past: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=size))

    def __call__(self, values: Tensor, valid: Tensor, prompts: Sequence[str]) -> Tensor:
        """Record this batch, then normalise each reward by its prompt's statistics: ``(B,)``."""
        for prompt, value, ok in zip(prompts, values.tolist(), valid.tolist(), strict=True):
            if ok:
                self._past[prompt].append(value)
        batch = values[valid].double()
        if not len(batch):
            return torch.zeros_like(values)
        overall = (batch.mean(), batch.std(unbiased=False))
        rows = []
        for prompt in prompts:
            past = torch.tensor(list(self._past[prompt]), dtype=torch.float64)
            enough = len(past) >= self.min_count
            mean, std = (past.mean(), past.std(unbiased=False)) if enough else overall
            rows.append((float(mean), float(std)))
        mean, std = torch.tensor(rows, device=values.device).unbind(1)
        return torch.where(valid, (values - mean) / (std + self.eps), 0.0).float()

    def state_dict(self) -> dict[str, list[float]]:
        """The recorded rewards, for checkpoints."""
        return {k: list(v) for k, v in self._past.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._past.clear()
        for prompt, values in state.items():
            self._past[prompt].extend(values)


def combined_advantage(
    parts: Mapping[str, Tensor], weights: Mapping[str, float], valid: Tensor, groups: Tensor,
    std: Std = "global", eps: float = 1e-4,
) -> Tensor:  # fmt: skip
    """Advantages per reward, then their weighted mean: ``(B,)``.

    Unlike a weighted sum of rewards, the result does not change when one reward is rescaled, so
    the reward with the largest deviation cannot drown the others (MixGRPO, 2507.21802).
    """
    total = sum(abs(w) for w in weights.values())
    result = torch.zeros(len(valid), device=valid.device)
    for name, weight in weights.items():
        ok = valid & torch.isfinite(parts[name])
        result += weight / total * group_advantage(parts[name], ok, groups, std, eps)
    return result


def keep_extremes(advantage: Tensor, valid: Tensor, groups: Tensor, keep: int) -> Tensor:
    """Mask ``(B,)`` of the best and worst ``keep / 2`` valid samples of each group (DanceGRPO).

    Advantages are computed on the whole group first; the mask only chooses whom to train on.
    Advantages ``(B, S)`` and ``(B, S, K)`` are summed over steps and kinds.
    """
    if advantage.ndim > 1:
        advantage = advantage.flatten(1).sum(1)
    if keep % 2 or keep < 2:
        raise ValueError(f"keep must be an even number of at least 2, got {keep}")
    mask = torch.zeros_like(advantage, dtype=torch.bool)
    groups, valid = groups.to(advantage.device), valid.to(advantage.device)
    for group in torch.unique(groups):
        rows = torch.nonzero((groups == group) & valid).flatten()
        order = rows[torch.argsort(advantage[rows], stable=True)]
        mask[order[: keep // 2]] = True
        mask[order[-(keep // 2) :]] = True
    return mask


def non_dominated(
    parts: Mapping[str, Tensor], weights: Mapping[str, float], valid: Tensor, groups: Tensor
) -> Tensor:
    """Mask ``(B,)`` of valid samples that no other of their group dominates (Parrot, 2401.05675).

    A sample dominates another if it is at least as good in every (weighted) reward and better in
    one. A sample that lacks one of the rewards is left out.
    """
    values = torch.stack([w * parts[name] for name, w in weights.items()], 1)
    scored = valid & torch.isfinite(values).all(1)
    mask = torch.zeros_like(valid)
    groups = groups.to(valid.device)
    for group in torch.unique(groups):
        rows = torch.nonzero((groups == group) & scored).flatten()
        if len(rows):
            mask[rows] = pareto_fronts(values[rows]) == 0
    return mask


def zero_spread_share(values: Tensor, valid: Tensor, groups: Tensor) -> float:
    """Share of groups whose valid rewards are all equal: they teach nothing."""
    _, spread = group_statistics(values, valid, groups)
    flat = {int(g): bool(s <= 1e-6) for g, s in zip(groups, spread, strict=True)}
    return sum(flat.values()) / max(len(flat), 1)
