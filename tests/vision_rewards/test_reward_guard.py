"""A failing scorer leaves samples unscored, and too many of those stop the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmalign.types import Media, Score
from vision_rewards.compose import WeightedSum
from vision_rewards.function import FunctionReward
from vision_rewards.guard import GuardedReward, RewardFailedError
from vision_rewards.shapes import ShapesPartial

MEDIA = Media(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
PROMPTS = ["a photo of a star"] * 4


def guarded(fn: Callable[..., Any], **options: Any) -> GuardedReward:
    return GuardedReward(FunctionReward(fn, "mine"), **options)


def explode(images: Any, prompts: Any) -> list[float]:
    raise RuntimeError("no such checkpoint")


def test_an_exception_becomes_unscored_samples() -> None:
    reward = guarded(explode)
    score = reward.score(MEDIA, PROMPTS)
    assert not score.valid.any() and torch.isnan(score.value).all()
    assert score.notes == ("RuntimeError: no such checkpoint",) * 4
    assert (reward.seen, reward.unscored, reward.exceptions) == (4, 4, 1)
    assert score.identity == reward.identity == reward.reward.identity


def test_a_malformed_result_is_an_exception_too() -> None:
    class Short(ShapesPartial):
        def score(self, *args: Any) -> Score:
            return super().score(MEDIA[:2], PROMPTS[:2])

    assert "2 scores for 4 samples" in GuardedReward(Short()).score(MEDIA, PROMPTS).notes[0]


def test_it_stops_past_the_declared_share() -> None:
    reward = guarded(explode, patience=8)
    reward.score(MEDIA, PROMPTS)
    with pytest.raises(RewardFailedError, match=r"'mine' left 8 of the last 8.*no such checkpoint"):
        reward.score(MEDIA, PROMPTS)


def test_old_failures_are_forgotten() -> None:
    results = iter([[None] * 4, *[[1.0] * 4] * 3, [None, None, 1.0, 1.0]])
    reward = guarded(lambda images, prompts: next(results), patience=12)
    for _ in range(5):
        reward.score(MEDIA, PROMPTS)
    assert (reward.seen, reward.unscored, reward.exceptions) == (20, 6, 0)


def test_exactly_the_declared_share_is_accepted() -> None:
    reward = guarded(lambda images, prompts: [None, None, 1.0, 1.0], patience=4)
    for _ in range(5):
        reward.score(MEDIA, PROMPTS)
    strict = guarded(lambda images, prompts: [None, 1.0, 1.0, 1.0], max_failed_share=0, patience=1)
    with pytest.raises(RewardFailedError):
        strict.score(MEDIA, PROMPTS)


def test_a_failed_batch_can_be_joined_with_a_good_one() -> None:
    reward = GuardedReward(WeightedSum({"mine": (FunctionReward(_sometimes()), 1.0)}))
    joined = Score.cat([reward.score(MEDIA, PROMPTS) for _ in range(2)])
    assert joined.valid.tolist() == [True] * 4 + [False] * 4
    assert torch.isnan(joined.parts["mine"]).tolist() == [False] * 4 + [True] * 4


def _sometimes() -> Callable[..., list[float]]:
    answers = iter([[1.0] * 4])

    def fn(images: Any, prompts: Any) -> list[float]:
        return next(answers)

    return fn


def test_interrupts_and_inner_guards_pass_through() -> None:
    def interrupt(images: Any, prompts: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded(interrupt).score(MEDIA, PROMPTS)
    with pytest.raises(RewardFailedError):
        GuardedReward(guarded(explode, patience=1)).score(MEDIA, PROMPTS)


def test_mistakes_of_the_caller_raise_at_once() -> None:
    with pytest.raises(ValueError, match="takes image, got a video"):
        guarded(explode).score(Media(torch.rand(4, 2, 3, 8, 8)), PROMPTS)
    with pytest.raises(ValueError, match="3 prompts"):
        guarded(explode).score(MEDIA, PROMPTS[:3])
    for options in ({"max_failed_share": 1.5}, {"patience": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            guarded(explode, **options)
