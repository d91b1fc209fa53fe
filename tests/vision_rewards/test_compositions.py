"""Sums, gates, minima, ensembles and transforms, in closed form; capabilities follow the parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.protocols import RewardModel
from mmalign.registry import UnknownNameError
from mmalign.types import Media, Score
from vision_rewards.compose import KINDS, CalibrationError, Reference, build
from vision_rewards.factory import load_reward
from vision_rewards.function import FunctionReward

PROMPTS = ["a", "b", "a", "c"]
MEDIA = Media(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def channel(index: int, scale: float = 1.0) -> FunctionReward:
    """Mean of one colour channel times ``scale``: differentiable."""

    def mean(images: Tensor, prompts: Any) -> Tensor:
        return scale * images[:, index].flatten(1).mean(1)

    return FunctionReward(mean, f"channel{index}", takes="tensor", differentiable=True)


def fixed(values: Sequence[float | None], low: float | None = None, name: str = "fixed") -> Any:
    """The same values for every batch."""

    def given(images: Tensor, prompts: Any) -> list[float | None]:
        return list(values)

    return FunctionReward(given, name, takes="tensor", range=(low, None))


def parts(*rewards: Any, weights: Sequence[float] = ()) -> dict[str, tuple[Any, float]]:
    """Rewards labelled a, b, c ..."""
    numbers = [*weights, *[1.0] * (len(rewards) - len(weights))]
    return {"abcdef"[i]: (r, w) for i, (r, w) in enumerate(zip(rewards, numbers, strict=True))}


def value(kind: str, components: Any, **options: Any) -> Score:
    return build(kind, components, options).score(MEDIA, PROMPTS)


A, B = [1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 2.0, -1.0]


def test_every_kind_is_a_reward_model_with_an_identity_of_its_own() -> None:
    reference = Reference("channel", (0.0, 0.5, 1.0), {})
    seen = set()
    for kind in KINDS:
        one = {"a": (channel(0), 1.0)}
        two = {**one, "b": (channel(1), 2.0)}
        known = {n: Reference(r.identity, reference.values) for n, (r, _) in two.items()}
        options: dict[str, Any] = {
            "gate": {"constraints": {"b": 0.1}, "mode": "hinge"},
            "calibrated": {"reference": known},
            "log_sigmoid": {"reference": known},
            "sigmoid": {"reference": known},
        }.get(kind, {})
        made = build(kind, one if kind == "win_rate" else two, options)
        assert isinstance(made, RewardModel)
        score = made.score(MEDIA, PROMPTS)
        assert score.identity == made.identity and len(score) == 4
        assert torch.isfinite(score.value[score.valid]).all()
        low, high = made.info.range
        assert low is None or (score.value[score.valid] >= low).all()
        assert high is None or (score.value[score.valid] <= high).all()
        empty = made.score(Media(torch.zeros(0, 3, 8, 8)), [])
        assert len(empty) == 0
        seen.add(made.identity)
    assert len(seen) == len(KINDS)


def test_gate() -> None:
    gate = build("gate", parts(fixed(A), fixed(B, name="b")), {
        "constraints": {"b": 0.5}, "floor": -9.0})  # fmt: skip
    score = gate.score(MEDIA, PROMPTS)
    assert score.value.tolist() == [-9.0, -2.0, 0.5, -9.0]
    assert score.parts["passed"].tolist() == [0, 1, 1, 0]
    hinge = value("gate", parts(fixed(A), fixed(B)), constraints={"b": 0.5}, mode="hinge",
                  penalty=2.0)  # fmt: skip
    assert hinge.value.tolist() == [1 - 2 * 0.5, -2.0, 0.5, 3 - 2 * 1.5]


def test_a_gate_without_a_known_floor_is_refused() -> None:
    with pytest.raises(ValueError, match="no lowest value"):
        build("gate", parts(fixed(A), fixed(B)), {"constraints": {"b": 0.5}})
    assert (
        build("gate", parts(fixed(A, low=-5.0), fixed(B)), {"constraints": {"b": 0}}).info.range[0]
        == -5.0
    )
    with pytest.raises(UnknownNameError, match="part to constrain"):
        build("gate", parts(fixed(A), fixed(B)), {"constraints": {"z": 0.5}})


def test_minimum_and_its_smooth_form() -> None:
    two = parts(fixed(A), fixed(B), weights=(2.0, 1.0))
    scaled = torch.stack([2 * torch.tensor(A), torch.tensor(B)])
    assert value("minimum", two).value.equal(scaled.amin(0))
    soft = value("minimum", two, temperature=0.7).value
    expected = -0.7 * torch.log(torch.exp(-scaled / 0.7).mean(0))
    torch.testing.assert_close(soft, expected)
    assert (soft >= scaled.amin(0)).all() and (soft <= scaled.mean(0) + 1e-6).all()
    near = value("minimum", two, temperature=1e-3).value
    torch.testing.assert_close(near, scaled.amin(0), atol=1e-3, rtol=0)


def test_ensemble() -> None:
    three = parts(fixed(A), fixed(B), fixed([1.0, None, 1.0, 1.0]))
    score = value("ensemble", three, k=1.5, min_members=2)
    first = torch.tensor([A[0], B[0], 1.0])
    torch.testing.assert_close(score.value[0], first.mean() - 1.5 * first.std(unbiased=False))
    second = torch.tensor([A[1], B[1]])
    torch.testing.assert_close(score.value[1], second.mean() - 1.5 * second.std(unbiased=False))
    torch.testing.assert_close(score.parts["disagreement"][0], first.std(unbiased=False))
    assert value("ensemble", three).valid.tolist() == [True, False, True, True]
    assert value("ensemble", three, worst=True).value[[0, 2, 3]].tolist() == [0.0, 0.5, -1.0]


def test_log_sigmoid_uses_the_prompts_own_reference() -> None:
    reward = fixed(A)
    known = Reference(reward.identity, (0.0, 1.0, 2.0, 3.0, 9.0),
                      {"a": (0.0, 1.0, 2.0, 3.0), "b": (9.0,)})  # fmt: skip
    score = value("log_sigmoid", {"r": (reward, 1.0)}, reference=known)
    own = torch.tensor([0.0, 1.0, 2.0, 3.0]).quantile(0.85)
    every = torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0]).quantile(0.85)
    level = torch.stack([own, every, own, every])  # one sample of "b" is not enough
    torch.testing.assert_close(score.value, F.logsigmoid(torch.tensor(A) - level))
    fixed_level = value("log_sigmoid", {"r": (reward, 2.0)}, baseline=0.5)
    torch.testing.assert_close(fixed_level.value, 2 * F.logsigmoid(torch.tensor(A) - 0.5))


def test_sigmoid_shaping_is_the_mean_over_reference_samples() -> None:
    reward = fixed(A)
    known = Reference(reward.identity, (0.0, 1.0, 4.0), {"a": (0.0, 1.0)})
    score = value("sigmoid", {"r": (reward, 1.0)}, reference=known, temperature=2.0)
    expected = [
        torch.sigmoid((torch.tensor(a) - torch.tensor(r)) / 2).mean()
        for a, r in zip(A, [[0.0, 1.0], [0.0, 1.0, 4.0]] * 2, strict=True)
    ]
    expected[2], expected[3] = (
        torch.sigmoid((torch.tensor(A[i]) - torch.tensor(r)) / 2).mean()
        for i, r in ((2, [0.0, 1.0]), (3, [0.0, 1.0, 4.0]))
    )
    torch.testing.assert_close(score.value, torch.stack(expected))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("weighted_sum", {}),
        ("minimum", {"temperature": 0.3}),
        ("ensemble", {"k": 0.7}),
        ("gate", {"constraints": {"b": 0.9}, "mode": "hinge", "penalty": 3.0}),
        ("log_sigmoid", {"baseline": 0.4}),
        ("sigmoid", {"baseline": 0.4}),
        ("calibrated", {"method": "zscore"}),
        ("calibrated", {"method": "quantile"}),
    ],
)
def test_gradients_agree_with_finite_differences(kind: str, options: dict[str, Any]) -> None:
    components = parts(channel(0), channel(1, 2.0), weights=(1.0, 0.5))
    if kind == "calibrated":
        grid = (0.1, 0.35, 0.8, 0.9, 1.7)
        options["reference"] = {n: Reference(r.identity, grid) for n, (r, _) in components.items()}
    reward = build(kind, components, options)
    assert reward.info.differentiable
    pixels = MEDIA.data.clone().requires_grad_()
    total = reward.score(Media(pixels), PROMPTS).value.sum()
    (gradient,) = torch.autograd.grad(total, pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
    eps = 1e-2
    ends = [
        reward.score(Media(pixels.detach() + s * eps * direction), PROMPTS).value.double().sum()
        for s in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / (2 * eps)
    assert math.isclose(
        float((gradient * direction).sum()), float(slope), rel_tol=0.03, abs_tol=1e-3
    )


@pytest.mark.parametrize("kind", ["weighted_sum", "minimum", "ensemble", "log_sigmoid"])
def test_an_unscored_part_poisons_neither_value_nor_gradient(kind: str) -> None:
    def half(images: Tensor, prompts: Any) -> Tensor:
        own = images.flatten(1).mean(1)
        return torch.where(torch.tensor([False, True, True, True]), own, torch.nan)

    broken = FunctionReward(half, "half", takes="tensor", differentiable=True)
    options = {"baseline": 0.0} if kind == "log_sigmoid" else {}
    reward = build(kind, parts(broken, channel(1)), options)
    pixels = MEDIA.data.clone().requires_grad_()
    score = reward.score(Media(pixels), PROMPTS)
    assert score.valid.tolist() == [False, True, True, True]
    (gradient,) = torch.autograd.grad(score.value[score.valid].sum(), pixels)
    assert torch.isfinite(gradient).all() and gradient[1:].abs().sum() > 0


def test_capabilities_follow_from_the_parts() -> None:
    plain = fixed(A)
    assert not build("weighted_sum", parts(channel(0), plain), {}).info.differentiable
    assert build("weighted_sum", parts(channel(0), channel(1)), {}).info.differentiable
    assert build("rank", parts(channel(0)), {}).info.scope == "group"
    assert not build("rank", parts(channel(0)), {}).info.differentiable
    nested = build("minimum", {"g": (build("rank", parts(plain), {}), 1.0), "p": (plain, 1.0)}, {})
    assert nested.info.scope == "group"
    assert set(nested.score(MEDIA, PROMPTS).parts) == {"g", "p"}


def test_what_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'minimum'"):
        build("minimun", parts(fixed(A)), {})
    with pytest.raises(UnknownNameError, match="Did you mean 'temperature'"):
        build("minimum", parts(fixed(A)), {"temprature": 1.0})
    with pytest.raises(ValueError, match="needs constraints"):
        build("gate", parts(fixed(A), fixed(B)), {})
    with pytest.raises(ValueError, match="either reference=FILE or baseline"):
        build("sigmoid", parts(fixed(A)), {})
    with pytest.raises(CalibrationError, match="were made by 'other'"):
        build("calibrated", parts(fixed(A)), {"reference": Reference("other", (0.0, 1.0))})
    with pytest.raises(CalibrationError, match="no scale"):
        reward = fixed(A)
        build("calibrated", parts(reward), {"reference": Reference(reward.identity, (2.0, 2.0))})
    for options, says in (({"k": -1.0}, "reward disagreement"), ({"min_members": 9}, "1..1")):
        with pytest.raises(ValueError, match=says):
            build("ensemble", parts(fixed(A)), options)


def test_a_composition_by_mapping() -> None:
    reward = load_reward(
        {
            "compose": "gate",
            "parts": {"fit": ("shapes_partial", 1.0), "size": ("jpeg_compressibility", 1.0)},
            "constraints": {"size": -0.9},
            "floor": -1.0,
        }
    )
    score = reward.score(MEDIA, ["a photo of a red star"] * 4)
    assert set(score.parts) == {"fit", "size", "passed"}
    listed = load_reward({"compose": "minimum", "parts": ["shapes_partial", "shapes_strict"]})
    assert listed.info.name == "minimum(shapes_partial, shapes_strict)"
    with pytest.raises(ValueError, match="needs parts"):
        load_reward({"compose": "minimum"})
    inner = {"compose": "minimum", "parts": ["shapes_partial", "shapes_strict"]}
    nested = load_reward({"m": (inner, 0.5), "jpeg_compressibility": 0.1})
    assert nested.info.name == "0.5*m + 0.1*jpeg_compressibility"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"penalty": -1.0, "mode": "hinge"}, "penalty must be 0 or more"),
        ({"penalty": float("nan")}, "penalty must be 0 or more"),
        ({"floor": float("nan")}, "'floor' of a gate must be a finite number"),
        ({"constraints": {"b": float("nan")}}, "'b' of a gate must be a finite number"),
    ],
)
def test_numbers_of_a_gate(options: dict[str, Any], says: str) -> None:
    components = {"a": (fixed(A), 1.0), "b": (fixed(B), 1.0)}
    given = {"constraints": {"b": 0.5}, "floor": 0.0, **options}
    with pytest.raises(ValueError, match=says):
        build("gate", components, given)
