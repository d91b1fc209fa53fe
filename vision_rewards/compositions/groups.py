"""Values that depend on the other samples of the same prompt: ranks and Pareto fronts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.registry import unknown
from mmalign.reward_info import Range, Scope, groups_of
from vision_rewards.compositions.base import Combined, Components, Composition, Parts


class _GroupReward(Composition):
    """Base: group scope, no gradients."""

    def scope(self, scopes: Mapping[str, Scope]) -> Scope:
        """Always ``group``; parts must not be pairwise."""
        super().scope({**scopes, "": "pointwise"})
        return "group"

    def keeps_gradients(self) -> bool:
        """Ranks have none."""
        return False


class GroupRank(_GroupReward):
    """Rank of the weighted sum within the prompt's samples, in (0, 1): ``(rank - 1/2) / n``.

    Ties share the mean of their ranks. The mean of a group is 1/2 whatever the reward's scale,
    so that no prompt dominates. Unscored samples take no part.
    """

    kind = "rank"

    def range(self) -> Range:
        """Open ends never reached."""
        return 0.0, 1.0

    def combine(self, parts: Parts) -> Combined:
        """Ranks group by group."""
        total, valid = parts.weighted().detach(), parts.valid.all(0)
        value = torch.full_like(total, torch.nan)
        for group in groups_of(parts.prompts, parts.context):
            rows = [r for r in group if valid[r]]
            if rows:
                own = total[rows]
                below = (own[None] < own[:, None]).sum(1)
                equal = (own[None] == own[:, None]).sum(1)
                value[rows] = (below + equal / 2) / len(rows)
        return Combined(value, valid)


class Pareto(_GroupReward):
    """Which samples are not dominated in any reward (Parrot, 2401.05675).

    A sample dominates another if it is at least as good in every (weighted) part and better in
    one. Fronts are peeled off one by one.

    Args:
        mode: ``front`` gives 1 to non-dominated samples and 0 to others, Parrot's selection;
            ``rank`` gives ``1 - front / fronts``, so that being nearly optimal counts too.
        within: ``prompt`` compares samples of one prompt, ``batch`` all, as in the paper.
    """

    kind = "pareto"

    def __init__(
        self,
        components: Components,
        *,
        mode: Literal["front", "rank"] = "front",
        within: Literal["prompt", "batch"] = "prompt",
    ) -> None:
        if mode not in ("front", "rank"):
            raise unknown("mode of pareto", mode, ("front", "rank"))
        if within not in ("prompt", "batch"):
            raise unknown("'within' of pareto", within, ("prompt", "batch"))
        self.mode, self.within = mode, within
        self.whole_batch = within == "batch"
        super().__init__(components)

    def options(self) -> Mapping[str, Any]:
        """Mode and comparison set."""
        return {"mode": self.mode, "within": self.within}

    def range(self) -> Range:
        """0 to 1."""
        return 0.0, 1.0

    def combine(self, parts: Parts) -> Combined:
        """Fronts group by group; ``front`` is 0 for non-dominated samples."""
        weights = torch.tensor(parts.weights, device=parts.values.device)
        scaled = (weights[:, None] * parts.values.detach()).T
        valid = parts.valid.all(0)
        front = torch.full_like(scaled[:, 0], torch.nan)
        value = front.clone()
        everybody = [list(range(len(front)))]
        groups = everybody if self.within == "batch" else groups_of(parts.prompts, parts.context)
        for group in groups:
            rows = [r for r in group if valid[r]]
            if rows:
                own = pareto_fronts(scaled[rows]).to(front)
                front[rows] = own
                graded = 1 - own / (own.max() + 1)
                value[rows] = (own == 0).to(front) if self.mode == "front" else graded
        return Combined(value, valid, {"front": front})


def pareto_fronts(values: Tensor) -> Tensor:
    """Number of the front of each row of ``(N, K)``, 0 for the non-dominated, ``(N,)`` int64."""
    at_least = (values[:, None] >= values[None]).all(-1)
    better = (values[:, None] > values[None]).any(-1)
    dominates = at_least & better  # [i, j]: i dominates j
    front = torch.full((len(values),), -1, dtype=torch.int64, device=values.device)
    level = 0
    while bool((front < 0).any()):
        left = front < 0
        dominated = (dominates & left[:, None]).any(0)
        front[left & ~dominated] = level
        level += 1
    return front
