"""What every registered reward promises, checked on all of them."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from mmalign.protocols import RewardModel
from mmalign.registry import REWARDS
from mmalign.shapes import caption, render, sample_scene, sample_spec
from mmalign.types import Media, Score
from vision_rewards.factory import load_reward

NAMES = [entry.name for entry in REWARDS]
# These need no download: a failure to load one of them is a failure, never a skip.
EMBEDDED = {"shapes_strict", "shapes_partial", "jpeg_compressibility", "jpeg_incompressibility"}
BATCH = 6


@pytest.fixture(scope="module", params=NAMES)
def reward(request: pytest.FixtureRequest) -> RewardModel:
    try:
        model = load_reward(request.param)
    except (OSError, ImportError) as error:
        if request.param in EMBEDDED:
            raise
        pytest.skip(f"{request.param} is not available here: {error}")
    if set(model.info.needs) - {"prompt"}:
        pytest.skip(f"{request.param} needs {model.info.needs}; its own tests cover it")
    if request.param == "ocr_strict":
        pytest.skip("ocr under another rule, and slow; its own tests cover it")
    if model.info.scope == "pairwise":
        pytest.skip(f"{request.param} compares pairs; its own tests cover it")
    return model


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, list[str]]:
    """Pictures ``(BATCH, 3, 64, 64)`` and prompts; every second prompt does not fit."""
    rng = random.Random(5)
    specs = [sample_spec(rng, "train") for _ in range(BATCH)]
    pictures = [render(sample_scene(s, rng)) for s in specs]
    asked = [s if k % 2 else sample_spec(rng, "train") for k, s in enumerate(specs)]
    return Media.from_pil(pictures).data, [caption(s) for s in asked]


def as_media(reward: RewardModel, pictures: Tensor) -> Media:
    if "image" in reward.info.media:
        return Media(pictures)
    return Media(pictures[:, None].repeat(1, 4, 1, 1, 1))


def score(reward: RewardModel, pictures: Tensor, prompts: list[str]) -> Score:
    if reward.info.name == "ocr":  # judges only what a prompt puts in quotes
        prompts = [f'{p}, with the words "{p}"' for p in prompts]
    with torch.no_grad():
        return reward.score(as_media(reward, pictures), prompts)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_info_is_filled(reward: RewardModel) -> None:
    info = reward.info
    assert isinstance(reward, RewardModel)
    assert info.name in REWARDS
    assert info.summary and info.source and info.licence
    assert info.media and set(info.media) <= {"image", "video"}


def test_score_is_well_formed(reward: RewardModel, batch: tuple[Tensor, list[str]]) -> None:
    got = score(reward, *batch)
    assert len(got) == BATCH
    assert got.value.dtype == torch.float32 and got.valid.dtype == torch.bool
    assert all(p.shape == (BATCH,) and p.dtype == torch.float32 for p in got.parts.values())
    assert got.identity == reward.identity
    assert got.valid.all(), got.notes
    assert torch.isfinite(got.value).all()


def test_values_lie_in_the_declared_range(
    reward: RewardModel, batch: tuple[Tensor, list[str]]
) -> None:
    got, (low, high) = score(reward, *batch), reward.info.range
    assert low is None or (got.value >= low).all()
    assert high is None or (got.value <= high).all()


def test_identity_is_stable(reward: RewardModel, batch: tuple[Tensor, list[str]]) -> None:
    before = reward.identity
    score(reward, *batch)
    assert before and reward.identity == before
    assert load_reward(reward.info.name).identity == before


def test_equal_inputs_give_equal_scores(
    reward: RewardModel, batch: tuple[Tensor, list[str]]
) -> None:
    if not reward.info.deterministic:
        pytest.skip("declared not deterministic")
    assert score(reward, *batch).value.equal(score(reward, *batch).value)


def test_scores_follow_the_order_of_the_batch(
    reward: RewardModel, batch: tuple[Tensor, list[str]]
) -> None:
    if not reward.info.deterministic:
        pytest.skip("declared not deterministic")
    pictures, prompts = batch
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
    straight = score(reward, pictures, prompts)
    shuffled = score(reward, pictures[order], [prompts[i] for i in order.tolist()])
    assert same(shuffled.value, straight.value[order])
    for name, part in straight.parts.items():
        assert same(shuffled.parts[name], part[order]), name


def test_scores_do_not_depend_on_the_batch_size(
    reward: RewardModel, batch: tuple[Tensor, list[str]]
) -> None:
    if not reward.info.deterministic or reward.info.scope == "group":
        pytest.skip("declared not deterministic, or scored as a group")
    pictures, prompts = batch
    alone = Score.cat(
        [score(reward, pictures[k : k + 1], prompts[k : k + 1]) for k in range(BATCH)]
    )
    assert same(alone.value, score(reward, pictures, prompts).value)


@pytest.mark.parametrize("kind", ["black", "white", "noise"])
def test_odd_pictures_never_raise(
    reward: RewardModel, batch: tuple[Tensor, list[str]], kind: str
) -> None:
    like = batch[0]
    odd = {
        "black": torch.zeros_like(like),
        "white": torch.ones_like(like),
        "noise": torch.rand(like.shape, generator=torch.Generator().manual_seed(0)),
    }[kind]
    got = score(reward, odd, batch[1])
    assert torch.isfinite(got.value[got.valid]).all()
    assert got.valid.all() or all(
        n for n, ok in zip(got.notes, got.valid.tolist(), strict=True) if not ok
    )


def test_gradients_flow_where_declared(
    reward: RewardModel, batch: tuple[Tensor, list[str]]
) -> None:
    if not reward.info.differentiable:
        pytest.skip("declared not differentiable")
    pictures = batch[0].clone().requires_grad_()
    got = reward.score(as_media(reward, pictures), batch[1])
    (gradient,) = torch.autograd.grad(got.value.sum(), pictures)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
