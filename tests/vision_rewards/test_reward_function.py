"""A user's function becomes a reward model, and its mistakes become clear errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.protocols import RewardModel
from mmalign.types import Media
from vision_rewards.function import FunctionReward

MEDIA = Media(torch.linspace(0, 1, 3)[:, None, None, None].expand(3, 3, 8, 8).clone())
PROMPTS = ["a", "bb", "ccc"]


def lengths(images: list[Any], prompts: list[str]) -> list[int]:
    """Number of characters."""
    return [len(p) for p in prompts]


@pytest.mark.parametrize("convert", [list, tuple, np.asarray, torch.tensor])
def test_what_a_function_may_return(convert: Callable[[list[float]], Any]) -> None:
    reward = FunctionReward(lambda images, prompts: convert([1.0, 2.0, 3.0]), "counts")
    score = reward.score(MEDIA, PROMPTS)
    assert isinstance(reward, RewardModel)
    assert score.value.dtype == torch.float32 and score.value.tolist() == [1.0, 2.0, 3.0]


def test_pil_or_tensor() -> None:
    seen: list[Any] = []

    def keep(images: Any, prompts: list[str]) -> list[float]:
        seen.append(images)
        return [0.0] * len(prompts)

    FunctionReward(keep).score(MEDIA, PROMPTS)
    FunctionReward(keep, takes="tensor").score(MEDIA, PROMPTS)
    assert isinstance(seen[0], list) and isinstance(seen[0][0], Image.Image)
    assert seen[1].equal(MEDIA.data)


def test_context_goes_to_those_who_take_it() -> None:
    context = [{"target": k} for k in range(3)]
    takers: list[Callable[..., list[int]]] = [
        lambda images, prompts, context: [c["target"] for c in context],
        lambda images, prompts, *, context=None: [c["target"] for c in context],
        lambda images, prompts, rows: [c["target"] for c in rows],
    ]
    for fn in takers:
        assert FunctionReward(fn).score(MEDIA, PROMPTS, context).value.tolist() == [0, 1, 2]
    scaled = FunctionReward(lambda images, prompts, scale=2.0: [scale] * 3)
    assert scaled.score(MEDIA, PROMPTS, context).value.tolist() == [2.0] * 3


def test_none_and_nan_are_unscored() -> None:
    reward = FunctionReward(lambda images, prompts: [1.0, None, float("nan")], "holes")
    score = reward.score(MEDIA, PROMPTS)
    assert score.valid.tolist() == [True, False, False]
    assert score.notes[0] == "" and "holes" in score.notes[1]


@pytest.mark.parametrize(
    ("result", "says"),
    [
        ([1.0, 2.0], "2 values for 3 samples"),
        (torch.zeros(3, 1), r"shape \(3, 1\)"),
        (1.0, "returned a float"),
        (None, "returned a NoneType"),
        ({"a": 1.0}, "returned a dict"),
        (["1", "2", "3"], "where a number belongs"),
    ],
)
def test_a_wrong_result_is_named(result: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FunctionReward(lambda images, prompts: result).score(MEDIA, PROMPTS)


def test_a_wrong_signature_is_named_at_once() -> None:
    for fn in (lambda images: [0.0], lambda a, b, c, d: [0.0], lambda a, b, *, extra: [0.0]):
        with pytest.raises(TypeError, match=r"fn\(images, prompts\)"):
            FunctionReward(fn)
    with pytest.raises(TypeError, match="callable"):
        FunctionReward(3)  # type: ignore[arg-type]


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="takes='tensor'"):
        FunctionReward(lengths, differentiable=True)
    with pytest.raises(ValueError, match="'pil' or 'tensor'"):
        FunctionReward(lengths, takes="numpy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="video"):
        FunctionReward(lengths).score(Media(torch.rand(3, 2, 3, 8, 8)), PROMPTS)


def test_gradients_flow_only_where_asked_for() -> None:
    def mean(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.flatten(1).mean(1)

    media = Media(MEDIA.data.clone().requires_grad_())
    score = FunctionReward(mean, takes="tensor", differentiable=True).score(media, PROMPTS)
    assert torch.autograd.grad(score.value.sum(), media.data)[0].ne(0).all()
    assert not FunctionReward(mean, takes="tensor").score(media, PROMPTS).value.requires_grad


def test_identity_follows_the_source() -> None:
    assert FunctionReward(lengths).identity == FunctionReward(lengths).identity
    assert FunctionReward(lengths).identity != FunctionReward(lengths, takes="tensor").identity
    other = FunctionReward(lambda images, prompts: [0.0] * 3, "lengths")
    assert other.identity != FunctionReward(lengths).identity
    assert FunctionReward(lengths).info.summary == "Number of characters."
