"""Frechet and kernel distances against closed forms, and on features of a real network."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from eval.metrics import distribution
from eval.metrics.distribution import (
    clip_mmd,
    clip_mmd_shares,
    distances_to_others,
    frechet_distance,
    gaussian,
    kernel_distance,
    polynomial,
    prompt_diversity,
    squared_mmd,
    vendi_score,
)
from mmalign.assets import asset
from mmalign.shapes import render, sample_scene, sample_spec
from mmalign.types import Media
from vision_rewards.embedding import load_embedder

RNG = np.random.default_rng(0)


def test_frechet_distance_of_known_gaussians() -> None:
    # One dimension: (m1 - m2)^2 + (s1 - s2)^2, with the sample deviations.
    a, b = RNG.normal(0, 1, (50, 1)), RNG.normal(3, 2, (70, 1))
    wanted = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(wanted)
    # A shift keeps the covariance: the distance is its square.
    x = RNG.normal(size=(100, 8))
    assert frechet_distance(x, x + 0.5) == pytest.approx(8 * 0.25, abs=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    # Scaled by 2 around 0: tr C for C -> 4 C, plus the mean's.
    wanted = np.trace(np.cov(x, rowvar=False)) + np.square(x.mean(0)).sum()
    assert frechet_distance(x, 2 * x) == pytest.approx(wanted)


def exact(mean: list[float], deviations: list[float], count: int = 60) -> np.ndarray:
    """A sample with exactly this mean, and a covariance of exactly these deviations."""
    x = RNG.normal(size=(count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x * deviations + mean


def test_frechet_distance_of_two_gaussians_with_any_number_of_rows() -> None:
    a, b = exact([0, 1, 2], [1, 2, 0.5]), exact([1, 1, 0], [3, 1, 0.5], 200)
    # Covariances that commute: |m1 - m2|^2 + sum (s1 - s2)^2.
    assert frechet_distance(a, b) == pytest.approx(5 + 4 + 1)
    # Covariances that do not: tr (C1 C2)^(1/2) of 2 x 2 is sqrt(tr C1 C2 + 2 sqrt(det C1 C2)).
    turn = np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    one, two = exact([0, 0], [1, 3]), exact([0, 0], [2, 1]) @ turn.T
    product = np.diag([1, 9]) @ turn @ np.diag([4, 1]) @ turn.T
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(9 * 4))
    assert frechet_distance(one, two) == pytest.approx(10 + 5 - 2 * root)
    # Fewer rows than columns: zeros beside the features change nothing.
    wide = [np.pad(x[:5], ((0, 0), (0, 20))) for x in (a, b)]
    assert frechet_distance(*wide) == pytest.approx(frechet_distance(a[:5], b[:5]))


def test_kid_of_two_gaussians() -> None:
    # In one dimension (x y + 1)^3 is a sum over powers, so that the biased MMD^2 is
    # 3 (m1 - m1')^2 + 3 (m2 - m2')^2 + (m3 - m3')^2 of the moments.
    a, b = RNG.normal(0, 1, (40, 1)), RNG.normal(1, 1, (30, 1))
    gaps = [(a**k).mean() - (b**k).mean() for k in (1, 2, 3)]
    wanted = 3 * gaps[0] ** 2 + 3 * gaps[1] ** 2 + gaps[2] ** 2
    assert squared_mmd(a, b, polynomial, unbiased=False) == pytest.approx(wanted)
    # N(0, 1) and N(1, 1) have the moments 0, 1, 0 and 1, 2, 4: 3 + 3 + 16.
    many = [np.random.default_rng(1).normal(m, 1, (2000, 1)) for m in (0, 1)]
    assert squared_mmd(*many, polynomial) == pytest.approx(22, rel=0.2)


def test_fid_and_kid_are_those_of_torch_fidelity() -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = RNG.normal(0, 1, (300, 16)), RNG.normal(0.3, 1.5, (250, 16))
    told = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    fid = fid_statistics_to_metric(*told, False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(fid, rel=1e-9)
    kid = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=20, kid_subset_size=100, verbose=False
    )
    mean, deviation = kernel_distance(a, b, subsets=20, size=100)
    assert mean == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-9)


def test_sums_over_blocks_are_those_over_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = RNG.normal(size=(150, 3)), RNG.normal(size=(170, 3))
    whole = squared_mmd(a, b, polynomial), clip_mmd(a, b), clip_mmd_shares(a, b)
    monkeypatch.setattr(distribution, "ROWS", 7)
    monkeypatch.setattr(distribution._blocks, "__defaults__", (7,))
    parts = squared_mmd(a, b, polynomial), clip_mmd(a, b), clip_mmd_shares(a, b)
    for x, y in zip(whole, parts, strict=True):
        assert x == pytest.approx(y, rel=1e-9)


def test_shares_of_the_cmmd() -> None:
    a, b = RNG.normal(size=(80, 6)), RNG.normal(0.5, 1, (60, 6))
    shares = clip_mmd_shares(a, b)
    whole = clip_mmd(a, b)
    assert shares.mean() == pytest.approx(whole)
    # Their standard error is the jackknife's.
    left = np.array([clip_mmd(np.delete(a, k, 0), b) for k in range(80)])
    jackknife = np.sqrt(79 / 80 * np.square(left - left.mean()).sum())
    assert shares.std(ddof=1) / np.sqrt(80) == pytest.approx(jackknife, rel=0.05)
    # What looks like nothing in the reference has the largest share.
    odd = np.vstack([b[:20], -5 * np.ones((1, 6))])
    assert clip_mmd_shares(odd, b).argmax() == 20


def test_mmd_by_hand() -> None:
    a, b = np.array([[0.0], [1.0]]), np.array([[1.0], [3.0]])
    # Linear kernel: unbiased mean of x x' = 0, of y y' = 3, of x y = 0.5 * 2.
    assert squared_mmd(a, b, lambda x, y: x @ y.T) == pytest.approx(0 + 3 - 2 * 1.0)
    # Biased: the squared distance of the means, 0.5 and 2.
    assert squared_mmd(a, b, lambda x, y: x @ y.T, unbiased=False) == pytest.approx(1.5**2)
    assert polynomial(np.array([[1.0, 3.0]]), np.array([[2.0, 2.0]]))[0, 0] == 5.0**3
    assert gaussian(np.array([[0.0, 3.0]]), np.array([[4.0, 0.0]]), 5.0)[0, 0] == pytest.approx(
        np.exp(-0.5)
    )


def test_kernel_distance_is_unbiased_and_sees_a_shift() -> None:
    x, y = RNG.normal(size=(400, 4)), RNG.normal(size=(400, 4))
    mean, spread = kernel_distance(x, y, subsets=20, size=200)
    assert abs(mean) < 3 * spread
    shifted, _ = kernel_distance(x, y + 1, subsets=20, size=200)
    assert shifted > 10 * abs(mean) and shifted == kernel_distance(x, y + 1, 20, 200)[0]


def test_clip_mmd_of_opposite_vectors() -> None:
    a = np.tile([[2.0, 0.0]], (3, 1))
    # |a - b|^2 = 4 on unit vectors: 1000 * 2 (1 - exp(-4 / 200)).
    assert clip_mmd(a, -a) == pytest.approx(2000 * (1 - np.exp(-0.02)))
    assert clip_mmd(a, 5 * a) == pytest.approx(0, abs=1e-9)


def test_diversity_within_prompts() -> None:
    features = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [3.0, 0.0], [1.0, 1.0]])
    assert prompt_diversity(features, ["a", "a", "b", "b", "c"]) == pytest.approx(0.5)
    assert prompt_diversity(features, list("abcde")) is None


def test_distances_to_the_other_pictures() -> None:
    features = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    assert distances_to_others(features) == pytest.approx([0.5, 1.0, 0.5])
    assert distances_to_others(features).mean() == pytest.approx(
        prompt_diversity(features, ["a"] * 3)  # type: ignore[arg-type]
    )
    with pytest.raises(ValueError, match="two pictures or more, got 1"):
        distances_to_others(features[:1])


def test_vendi_score_counts_different_pictures() -> None:
    assert vendi_score(np.ones((5, 3))) == pytest.approx(1)
    assert vendi_score(np.eye(4, 7)) == pytest.approx(4)
    # Two kinds, 3 and 1 of 4: exp of the entropy of (3/4, 1/4); more rows than columns or not.
    kinds = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    wanted = np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    assert vendi_score(kinds) == pytest.approx(wanted)
    assert vendi_score(np.pad(kinds, ((0, 0), (0, 9)))) == pytest.approx(wanted)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        frechet_distance(np.zeros((1, 4)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match=r"\(5, 3\)"):
        squared_mmd(np.zeros((5, 4)), np.zeros((5, 3)), polynomial)


def test_features_of_a_real_network_tell_sets_apart() -> None:
    rng = random.Random(0)
    embedder = load_embedder(asset("shapes-clip"))

    def features(task: str, count: int = 40) -> np.ndarray:
        scenes = [sample_scene(sample_spec(rng, "test", task), rng) for _ in range(count)]
        return embedder.image(Media.from_pil([render(s) for s in scenes]).data).detach().numpy()

    one, again, other = features("counting"), features("counting"), features("single_object")
    for distance in (frechet_distance, clip_mmd, lambda a, b: kernel_distance(a, b, 5)[0]):
        assert distance(one, other) > 2 * distance(one, again)
