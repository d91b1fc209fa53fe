r"""Rubric Policy Optimisation (after Auto-Rubric as Reward, Tian et al. 2026, 2605.08354).

A judge decides criteria of a rubric for each picture of a prompt; who beats whom is one word, yes
or no, and the policy gradient sees nothing else. With :math:`c_{ik}` the judge's verdict on
criterion :math:`k` of picture :math:`i` and :math:`w_k` the criterion's weight, pictures of one
prompt are compared criterion by criterion, and the weighted majority decides:

.. math:: v_{ij} = \sum_k w_k\, \mathrm{sign}(c_{ik} - c_{jk}), \qquad b_{ij} = [v_{ij} > 0]

Criteria on which two pictures agree, or that do not apply to one of them, do not vote, so one that
never tells pictures apart has no influence. The binary reward of a picture is

* ``majority``: :math:`R_i = [\sum_j b_{ij} > \sum_j b_{ji}]`, it beats more pictures of its prompt
  than beat it;
* ``next``: :math:`R_i = b_{i,i+1}`, it beats the next picture of its prompt (the last: the first);
* ``threshold``: :math:`R_i = [s_i \ge \tau]` with the judge's score :math:`s_i`, which for verdicts
  in {0, 1} is the share of weight that is met: with :math:`\tau = 1` every criterion is.

and advantages are :math:`A_i = (R_i - \bar R) / (\mathrm{std} + \epsilon)` as the recipe's section
``advantage`` says, for the clipped loss of :mod:`trainers.flow_grpo`. Without ``criteria`` the
score itself is the only one: verdicts in {0, 1} with the same weights for all pictures of a prompt
have :math:`v_{ij} \propto s_i - s_j`, so the majority is the order of the scores. No code was
published; opponents from the same prompt's samples are chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.config import ConfigError
from mmalign.reward_info import RewardInfo
from mmalign.types import Score
from trainers.advantages import group_advantage
from trainers.credit import Credit
from trainers.flow_grpo import FlowGrpo

TIE = 1e-6  # verdicts nearer than this differ by rounding


@dataclass(frozen=True, kw_only=True)
class RubricPo(FlowGrpo):
    """The Rubric Policy Optimisation objective; options of Flow-GRPO.

    Attributes:
        against: ``majority``, ``next`` or ``threshold``, see above.
        criteria: parts of the score that are criteria, with their weights :math:`w_k`; none takes
            the score itself.
        threshold: :math:`\\tau`, of ``threshold``.
    """

    against: Literal["majority", "next", "threshold"] = "majority"
    criteria: Mapping[str, float] = field(default_factory=dict)
    threshold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, weight in self.criteria.items():
            if not weight > 0:
                raise ValueError(f"criteria.{name} must be positive, got {weight}; or leave it out")
        if self.criteria and self.against == "threshold":
            raise ValueError(
                "criteria are for comparisons of two pictures, but against is 'threshold', which "
                "looks at the score; remove them"
            )

    def check_recipe(self, config: Any) -> None:
        """Refuse advantages that are not those of a prompt's verdicts.

        Raises:
            ConfigError: names the setting and what to do.
        """
        for key, wanted in (("baseline", "group"), ("combine", "rewards")):
            value = getattr(config.advantage, key)
            if value != wanted:
                raise ConfigError(
                    f"advantage.{key} is {value!r}, but algorithm {config.algorithm!r} makes one "
                    f"verdict of each picture among those of its prompt; use {key}: {wanted}"
                )

    def check_reward(self, info: RewardInfo) -> None:
        """Refuse a threshold that no score, or every score, reaches.

        Raises:
            ConfigError: names the threshold and the range.
        """
        low = -math.inf if info.range[0] is None else info.range[0]
        high = math.inf if info.range[1] is None else info.range[1]
        if self.against == "threshold" and not low < self.threshold <= high:
            raise ConfigError(
                f"objective.threshold is {self.threshold}, but scores of {info.name!r} lie in "
                f"[{low:g}, {high:g}]: every verdict would be the same"
            )

    def advantage(self, credit: Credit) -> Tensor:
        """Normalised binary rewards, ``(B,)``; 0 where unscored."""
        score, options = credit.score, credit.options
        verdicts = self.verdicts(score, credit.groups)
        return group_advantage(verdicts, score.valid, credit.groups, options.std, options.eps)

    def verdicts(self, score: Score, groups: Tensor) -> Tensor:
        """:math:`R`, ``(B,)`` in {0, 1}; 0 where unscored."""
        if self.against == "threshold":
            return (score.valid & (score.value >= self.threshold - TIE)).float()
        columns, weights = self._criteria(score)
        found = torch.zeros_like(score.value)
        for group in torch.unique(groups):
            rows = torch.nonzero((groups.to(found.device) == group.to(found.device)) & score.valid)
            beats = majority(columns[rows.flatten()], weights)
            if self.against == "next":
                found[rows.flatten()] = beats.roll(-1, 1).diagonal().float()
            else:
                found[rows.flatten()] = (beats.sum(1) > beats.sum(0)).float()
        return found

    def _criteria(self, score: Score) -> tuple[Tensor, Tensor]:
        """Verdicts on criteria ``(B, K)``, NaN where one does not apply, and weights ``(K,)``."""
        for name in self.criteria:
            if name not in score.parts:
                raise ConfigError(
                    f"objective.criteria names {name!r}, but the reward's parts are "
                    f"{', '.join(score.parts) or 'none'}"
                )
        columns = [score.parts[name] for name in self.criteria] or [score.value]
        weights = list(self.criteria.values()) or [1.0]
        return torch.stack(columns, 1).double(), columns[0].new_tensor(weights).double()


def majority(verdicts: Tensor, weights: Tensor) -> Tensor:
    """``b``, ``(n, n)`` bool: whether row ``i`` beats row ``j`` by the weighted majority.

    Args:
        verdicts: ``(n, K)``, NaN where a criterion does not apply; ``weights``: ``(K,)``.
    """
    gap = verdicts[:, None] - verdicts[None]
    votes = torch.where(gap.abs() > TIE, gap.sign(), 0.0)  # NaN compares as false
    return (votes * weights).sum(-1) > TIE
