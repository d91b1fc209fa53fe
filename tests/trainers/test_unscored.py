"""Unscored samples are masked wherever scores are used; nowhere do they count as zeros."""

from __future__ import annotations

import math

import pytest
import torch

from mmalign.types import Score
from trainers import entry
from trainers.config import AdvantageConfig
from trainers.credit import Credit
from trainers.metrics import score_metrics
from vision_rewards.function import FunctionReward

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
VALID = torch.tensor([True, True, False, True, True, True, False, False, False])
VALUES = torch.tensor([1.0, 3.0, math.nan, 5.0, 5.0, 8.0, math.nan, math.nan, math.nan])


def test_metrics_of_scored_samples_only():
    part = torch.where(VALID, VALUES, torch.nan)
    score = Score(VALUES, VALID, {"part": part})
    advantage = torch.tensor([-1.0, 1.0, 0, -0.5, -0.5, 1.0, 0, 0, 0])
    found = score_metrics(score, GROUPS, advantage)
    scored = VALUES[VALID]
    assert found["reward/valid"] == pytest.approx(5 / 9)
    assert found["reward/mean"] == pytest.approx(float(scored.mean())) == found["reward/part/part"]
    assert found["reward/std"] == pytest.approx(float(scored.std(unbiased=False)))
    spread = [torch.tensor(g).std(unbiased=False) for g in ([1.0, 3.0], [5.0, 5.0, 8.0])]
    assert found["reward/group_std"] == pytest.approx(float(2 * spread[0] + 3 * spread[1]) / 5)
    assert found["advantage/abs_mean"] == pytest.approx(4.0 / 5)


def test_nothing_scored_is_no_number():
    score = Score(VALUES, torch.zeros(9, dtype=torch.bool))
    found = score_metrics(score, GROUPS, torch.zeros(9))
    assert found["reward/valid"] == 0
    assert not {"reward/mean", "reward/std", "reward/group_std", "advantage/abs_mean"} & {*found}


def test_sizes_of_advantages_by_step():
    advantage = torch.arange(18.0).reshape(9, 2) * VALID[:, None]
    credit = Credit(
        score=Score(VALUES, VALID), groups=GROUPS, outcome=advantage[:, 0], steps=(2, 4),
        options=AdvantageConfig(),
    )  # fmt: skip
    found = credit.metrics(advantage)
    wanted = advantage[VALID].abs().mean(0)
    assert [found["by_step/advantage/2"], found["by_step/advantage/4"]] == wanted.tolist()


@pytest.mark.parametrize("kl_beta", [0.0, 0.1])
def test_an_update_is_that_of_the_scored_samples_alone(kit, tmp_path, kl_beta):
    """With three of eight unscored, the gradient is the mean over five, not five eighths of it."""

    def partly(media, prompts):
        scores = media.flatten(1).mean(1)
        scores[[1, 2, 6]] = math.nan
        return scores

    changes = {"objective": {"kl_beta": kl_beta}, "optim__grad_clip": 0.0, "advantage__std": "none"}
    config = kit.cheap(tmp_path, **changes)
    trainer = entry.build(config, tmp_path, FunctionReward(partly, takes="tensor"))
    metrics = trainer.train_step()

    twin = entry.build(config, tmp_path, kit.brightness)
    rollout, _ = twin.rollouts.sample(0)
    rows = torch.tensor([0, 3, 4, 5, 7])
    values = rollout.media.data.flatten(1).mean(1)[rows]
    means = torch.stack([values[:2].mean()] * 2 + [values[2:].mean()] * 3)
    _, norm = twin.update(rollout[rows], values - means, torch.ones(5, dtype=torch.bool), 5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 0
