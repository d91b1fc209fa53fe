"""Pairs of a subject's reference picture and the model's own picture of the same prompt (RPO)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmalign.config import ConfigError
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling import Plan
from mmalign.types import Media, Rollout, Score
from trainers.config import TrainConfig
from trainers.credit import everywhere
from trainers.data import Rows, rows_of_step
from trainers.preferences.latents import fitted
from trainers.rollouts import Rollouts, everywhere_sum
from vision_rewards.prefetch import Prefetch
from vision_rewards.similarity import pictures_digest, reference_pictures

PAIR = 2  # rows of a group: a reference picture and a generated one


class SubjectPairs(Rollouts):
    """One picture of each prompt is drawn; the one before it in its group is a reference picture.

    Attributes:
        labelled: scores are labels, ``2 y - 1`` and its opposite, which are advantages as they are.
        pictures: the subject's, ``(N, 3, H, W)`` at the size of the policy; ``latents`` of them.

    Raises:
        ConfigError: the reward compares with other references than are trained on, or the policy
            cannot encode pictures.
    """

    labelled = True

    def __init__(self, config: TrainConfig, *arguments: Any) -> None:
        super().__init__(config, *arguments)
        found = reference_pictures(self.objective.references)
        own = getattr(getattr(self.reward, "reward", self.reward), "references", None)
        if own is not None and pictures_digest(own) != pictures_digest(found):
            raise ConfigError(
                f"objective.references is {self.objective.references!r}, but the reward compares "
                "with other pictures; give both the same references"
            )
        encode = getattr(self.policy, "encode_image", None)
        if encode is None:
            raise ConfigError(f"{self.policy.name} cannot encode pictures (it has no encode_image)")
        height, width = self.policy.sampler.height, self.policy.sampler.width
        sized = torch.stack([fitted(p, height, width) for p in found])
        self.pictures = sized.to(self.policy.device)
        with torch.no_grad():
            self.latents: Tensor = encode(Media(self.pictures)).float()
        self._step = 0
        self._numbers: dict[str, float] = {}

    def sample(
        self, step: int, scorer: Prefetch | None = None, plan: Plan | None = None
    ) -> tuple[Rollout, int]:
        """This process's share of the pairs of ``step``; evaluations over all processes."""
        self._step, plan = step, plan or self.plan(step)
        rows = self._rows(step)
        rows = rows.part(self.accelerator.process_index, self.accelerator.num_processes, PAIR)
        drawn = self._collect(rows[1::PAIR], plan)
        chosen = [self._reference(step, g) for g in drawn.groups.tolist()]
        shown = replace(
            drawn, final=self.latents[chosen].to(drawn.final), media=Media(self.pictures[chosen]),
            seeds=rows.seeds[0::PAIR],
        )  # fmt: skip
        order = torch.arange(len(rows)).reshape(PAIR, -1).T.flatten()
        rollout = Rollout.cat([shown, drawn])[order]
        return rollout, everywhere_sum(self.accelerator, drawn.nfe)

    def _rows(self, step: int) -> Rows:
        """All rows of a step; its first pairs have the subject's own prompt, where there is one."""
        rows = rows_of_step(self.config, self.prompts, step)
        if not (own := self.objective.subject_prompt):
            return rows
        alone = max(1, round(self.objective.subject_share * self.config.prompts_per_step))
        return replace(rows, prompts=(own,) * PAIR * alone + rows.prompts[PAIR * alone :])

    def seen(self, steps: int) -> set[str]:
        """The prompts of the first ``steps`` steps, and the subject's own."""
        own = self.objective.subject_prompt
        return super().seen(steps) | ({own} if own else set())

    def _reference(self, step: int, group: int) -> int:
        """Which reference picture a pair has: all of them in turn."""
        return (step * self.config.prompts_per_step + group) % len(self.pictures)

    @torch.no_grad()
    def score(self, rollout: Rollout, scorer: Prefetch | None = None) -> tuple[Score, Tensor]:
        """Labels and groups of all samples of the step, over all processes in row order.

        Raises:
            RewardFailedError: on all processes, where it was raised on one of them.
        """
        shares = everywhere(
            self.accelerator,
            lambda: (self._local_score(rollout, None).to("cpu"), rollout.groups.cpu()),
        )
        score, groups = Score.cat([s for s, _ in shares]), torch.cat([g for _, g in shares])
        reference, drawn = score[0::PAIR], score[1::PAIR]
        q = self.objective.probability(reference.value, drawn.value)
        coins = [self._coin(g) for g in groups[0::PAIR].tolist()]
        y = self.objective.targets(q, torch.tensor(coins, dtype=torch.float64))
        valid = (reference.valid & drawn.valid).repeat_interleave(PAIR)
        self._numbers = {
            **_means("reward", drawn), "reward/reference": _mean(reference.value, reference.valid),
            "preferred": _mean(q, reference.valid & drawn.valid),
        }  # fmt: skip
        labels = torch.stack([2 * y - 1, 1 - 2 * y], 1).flatten().float()
        found = Score(torch.where(valid, labels, 0.0), valid, {}, (), self.reward.identity)
        return found.to(self.policy.device), groups

    def _coin(self, group: int) -> float:
        """Uniform in [0, 1), anew for each pair of each step."""
        return random.Random(stable_seed("label", self.config.seed, self._step, group)).random()

    def metrics(self, rollout: Rollout) -> dict[str, float]:
        """Rewards of the pictures drawn (``reward/mean``) and of the reference pictures."""
        return super().metrics(rollout) | self._numbers


def _means(name: str, score: Score) -> dict[str, float]:
    parts = {f"{name}/part/{n}": _mean(v, score.valid) for n, v in score.parts.items()}
    return {f"{name}/mean": _mean(score.value, score.valid), **parts}


def _mean(values: Tensor, valid: Tensor) -> float:
    return float(values[valid].double().mean()) if bool(valid.any()) else float("nan")
