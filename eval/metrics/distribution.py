"""Distances between two sets of pictures, on features of any network; diversity within a prompt.

With means ``m`` and covariances ``C`` of the features of two sets (FID: Heusel et al., 1706.08500;
KID: Binkowski et al., 1801.01401; CMMD: Jayasumana et al., 2401.09603)::

    FID   |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
    MMD^2 mean k(x, x') + mean k(y, y') - 2 mean k(x, y),    x != x', y != y' where unbiased
    KID   MMD^2 with k(a, b) = (a.b / d + 1)^3, unbiased, mean over random subsets
    CMMD  1000 MMD^2 with k(a, b) = exp(-|a - b|^2 / (2 * 10^2)) on unit vectors, biased

The published FID and KID are of Inception's 2048 features, CMMD of CLIP ViT-L/14 at 336 pixels;
numbers of other features are not comparable with theirs. FID is biased by the number of pictures:
compare equal numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.linalg import sqrtm

Array = np.ndarray
Kernel = Callable[[Array, Array], Array]


def frechet_distance(a: Array, b: Array) -> float:
    """Squared Frechet distance of Gaussians fitted to features ``(N, d)`` and ``(M, d)``.

    Raises:
        ValueError: fewer than two rows, or different widths.
    """
    _check(a, b)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # The root of a product of singular matrices has an imaginary part from rounding alone.
    root = np.asarray(sqrtm(first @ second)).real
    apart = np.square(a.mean(0) - b.mean(0)).sum()
    return float(apart + np.trace(first) + np.trace(second) - 2 * np.trace(root))


def squared_mmd(a: Array, b: Array, kernel: Kernel, unbiased: bool = True) -> float:
    """Squared maximum mean discrepancy of features ``(N, d)`` and ``(M, d)``."""
    _check(a, b)
    n, m = len(a), len(b)
    same = [kernel(a, a), kernel(b, b)]
    if unbiased:
        means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in same]
    else:
        means = [k.mean() for k in same]
    return float(sum(means) - 2 * kernel(a, b).sum() / (n * m))


def kernel_distance(
    a: Array, b: Array, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: mean and deviation over random subsets of at most ``size`` rows."""
    _check(a, b)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    rng = np.random.default_rng(seed)
    size = min(size, len(a), len(b))
    drawn = [
        squared_mmd(a[rng.choice(len(a), size, replace=False)],
                    b[rng.choice(len(b), size, replace=False)], polynomial)
        for _ in range(subsets)
    ]  # fmt: skip
    return float(np.mean(drawn)), float(np.std(drawn))


def clip_mmd(a: Array, b: Array, sigma: float = 10.0) -> float:
    """CMMD of embeddings, which are made unit vectors first."""
    one, two = (np.asarray(x, np.float64) for x in (a, b))
    one, two = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, two))
    return 1000 * squared_mmd(one, two, lambda x, y: gaussian(x, y, sigma), unbiased=False)


def polynomial(a: Array, b: Array) -> Array:
    """``(a.b / d + 1)^3`` of all pairs of rows."""
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)


def gaussian(a: Array, b: Array, sigma: float) -> Array:
    """``exp(-|a - b|^2 / (2 sigma^2))`` of all pairs of rows."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.asarray(np.exp(-np.maximum(squares, 0) / (2 * sigma**2)))


def prompt_diversity(features: Array, prompts: Sequence[str]) -> float | None:
    """Mean of ``1 - cos`` over pairs of pictures of a prompt, then over prompts.

    ``None`` where no prompt has two pictures. A generator that draws one picture again and again
    is at 0, whatever its scores.
    """
    unit = np.asarray(features, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    found = []
    for rows in groups.values():
        if len(rows) > 1:
            cosine = unit[rows] @ unit[rows].T
            n = len(rows)
            found.append(1 - (cosine.sum() - np.trace(cosine)) / (n * (n - 1)))
    return float(np.mean(found)) if found else None


def _check(a: Array, b: Array) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features must be (N, d) and (M, d) with N, M of 2 or more, got {a.shape}, {b.shape}"
        )
