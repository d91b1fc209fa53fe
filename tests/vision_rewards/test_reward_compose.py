"""A weighted sum is a reward model that keeps its components' facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmalign.protocols import RewardModel
from mmalign.types import Media
from vision_rewards.compose import WeightedSum
from vision_rewards.function import FunctionReward
from vision_rewards.jpeg import JpegCompressibility
from vision_rewards.shapes import ShapesPartial, ShapesStrict

MEDIA = Media(torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
PROMPTS = ["x"] * 3


def brightness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return images.flatten(1).mean(1)


def made(fn: Callable[..., Any], **options: Any) -> FunctionReward:
    return FunctionReward(fn, takes="tensor", **options)


def test_the_sum_and_its_parts() -> None:
    total = WeightedSum(
        {"light": (made(brightness), 2.0), "one": (made(lambda i, p: [1.0, 2.0, 3.0]), -0.5)}
    )
    score = total.score(MEDIA, PROMPTS)
    light = brightness(MEDIA.data, None)
    assert isinstance(total, RewardModel) and score.valid.all() and score.notes == ()
    torch.testing.assert_close(score.value, 2 * light - 0.5 * torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(score.parts["light"], light)
    assert score.parts["one"].tolist() == [1.0, 2.0, 3.0]


def test_valid_only_where_every_component_is() -> None:
    total = WeightedSum(
        {"a": (made(lambda i, p: [1.0, None, 1.0]), 1), "b": (made(lambda i, p: [1, 1, None]), 1)}
    )
    score = total.score(MEDIA, PROMPTS)
    assert score.valid.tolist() == [True, False, False]
    assert score.notes[1].startswith("a: ") and score.notes[2].startswith("b: ")
    assert score.parts["a"][2] == 1.0


def test_gradients_flow_and_survive_an_unscored_sample() -> None:
    def root(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return (images.flatten(1).mean(1) - torch.tensor([9.0, 0.0, 0.0])).sqrt()

    parts = {"r": (made(root, differentiable=True), 1.0)}
    parts["l"] = (made(brightness, differentiable=True), 1.0)
    media = Media(MEDIA.data.clone().requires_grad_())
    total = WeightedSum(parts)
    score = total.score(media, PROMPTS)
    assert total.info.differentiable and score.valid.tolist() == [False, True, True]
    (gradient,) = torch.autograd.grad(score.value[score.valid].sum(), media.data)
    assert torch.isfinite(gradient[1:]).all() and gradient[1:].abs().sum() > 0


def test_declarations_are_derived() -> None:
    total = WeightedSum({"s": (ShapesStrict(), 1.0), "j": (JpegCompressibility(), -2.0)})
    info = total.info
    assert info.name == "1*s + -2*j" and info.media == ("image",)
    assert not info.differentiable and info.deterministic and info.needs == ("prompt",)
    assert info.range == (0.0, None)
    assert info.source and info.licence == "Apache-2.0"
    random = made(brightness, deterministic=False)
    assert not WeightedSum({"s": (ShapesStrict(), 1), "r": (random, 1)}).info.deterministic


def test_identity_covers_components_and_weights() -> None:
    strict, partial = (ShapesStrict(), 1.0), (ShapesPartial(), 0.5)
    one = WeightedSum({"a": strict, "b": partial})
    assert one.identity == WeightedSum({"a": strict, "b": partial}).identity
    assert one.identity != WeightedSum({"a": strict, "b": (ShapesPartial(), 0.25)}).identity
    assert one.identity != WeightedSum({"a": strict, "b": (ShapesStrict(), 0.5)}).identity


def test_a_sum_of_sums() -> None:
    inner = WeightedSum({"light": (made(brightness), 2.0)})
    outer = WeightedSum({"inner": (inner, 3.0)}).score(MEDIA, PROMPTS)
    torch.testing.assert_close(outer.value, 6 * brightness(MEDIA.data, None))


def test_what_is_refused() -> None:
    video = made(brightness, media=("video",))
    with pytest.raises(ValueError, match="at least one component"):
        WeightedSum({})
    with pytest.raises(ValueError, match=r"weight of 's' is nan"):
        WeightedSum({"s": (ShapesStrict(), float("nan"))})
    with pytest.raises(ValueError, match="every weight is 0"):
        WeightedSum({"s": (ShapesStrict(), 0.0)})
    with pytest.raises(ValueError, match="s takes image, v takes video"):
        WeightedSum({"s": (ShapesStrict(), 1.0), "v": (video, 1.0)})
