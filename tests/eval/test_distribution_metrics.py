"""Frechet and kernel distances against closed forms, and on features of a real network."""

from __future__ import annotations

import random

import numpy as np
import pytest

from eval.metrics.distribution import (
    clip_mmd,
    frechet_distance,
    gaussian,
    kernel_distance,
    polynomial,
    prompt_diversity,
    squared_mmd,
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
