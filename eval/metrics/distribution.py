"""Distances between two sets of pictures, on features of any network; diversity of one set.

With means ``m`` and covariances ``C`` of the features of two sets (FID: Heusel et al., 1706.08500;
KID: Binkowski et al., 1801.01401; CMMD: Jayasumana et al., 2401.09603), and the eigenvalues ``l``
of the cosines of ``n`` pictures over ``n`` (Vendi score: Friedman and Dieng, 2210.02410)::

    FID   |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
    MMD^2 mean k(x, x') + mean k(y, y') - 2 mean k(x, y),    x != x', y != y' where unbiased
    KID   MMD^2 with k(a, b) = (a.b / d + 1)^3, unbiased, mean over random subsets
    CMMD  1000 MMD^2 with k(a, b) = exp(-|a - b|^2 / (2 * 10^2)) on unit vectors, biased
    Vendi exp(-sum l log l): 1 where all pictures are one, n where none has to do with another

The published FID and KID are of Inception's 2048 features, CMMD of CLIP ViT-L/14 at 336 pixels;
numbers of other features are not comparable with theirs. FID is biased by the number of pictures:
compare equal numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Array = np.ndarray
Kernel = Callable[[Array, Array], Array]
ROWS = 1024  # of a kernel's matrix that are held at once
SEED = 2020  # torch-fidelity's, so that the subsets of its KID are drawn


def frechet_distance(a: Array, b: Array) -> float:
    """Squared Frechet distance of Gaussians fitted to features ``(N, d)`` and ``(M, d)``.

    Raises:
        ValueError: fewer than two rows, or different widths.
    """
    _check(a, b)
    one, two = (np.asarray(x, np.float64) for x in (a, b))
    apart = np.square(one.mean(0) - two.mean(0)).sum()
    # Centred and scaled, so that a covariance is A^T A.
    one, two = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (one, two))
    return float(apart + np.square(one).sum() + np.square(two).sum() - 2 * _root_trace(one, two))


def _root_trace(a: Array, b: Array) -> float:
    """``tr((A^T A B^T B)^(1/2))``: the sum of the singular values of ``A B^T``.

    With more rows than columns a factor ``R`` of ``A = Q R`` has the same singular values.
    """

    def short(x: Array) -> Array:
        return np.asarray(np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x)

    return float(np.linalg.svd(short(a) @ short(b).T, compute_uv=False).sum())


def squared_mmd(a: Array, b: Array, kernel: Kernel, unbiased: bool = True) -> float:
    """Squared maximum mean discrepancy of features ``(N, d)`` and ``(M, d)``."""
    _check(a, b)
    own = [(x, len(x), _total(x, x, kernel)) for x in (a, b)]
    if unbiased:
        means = [(s - _diagonal(x, kernel)) / (n * (n - 1)) for x, n, s in own]
    else:
        means = [s / n**2 for _, n, s in own]
    return float(sum(means) - 2 * _total(a, b, kernel) / (len(a) * len(b)))


def kernel_distance(
    a: Array, b: Array, subsets: int = 100, size: int = 1000, seed: int = SEED
) -> tuple[float, float]:
    """KID: mean and deviation over random subsets of at most ``size`` rows.

    They are drawn as torch-fidelity draws them, so that the number is its number.
    """
    _check(a, b)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    rng = np.random.RandomState(seed)
    size = min(size, len(a), len(b))
    drawn = [
        squared_mmd(a[rng.choice(len(a), size, replace=False)],
                    b[rng.choice(len(b), size, replace=False)], polynomial)
        for _ in range(subsets)
    ]  # fmt: skip
    return float(np.mean(drawn)), float(np.std(drawn))


def clip_mmd(a: Array, b: Array, sigma: float = 10.0) -> float:
    """CMMD of embeddings, which are made unit vectors first."""
    one, two = unit(a), unit(b)
    return 1000 * squared_mmd(one, two, lambda x, y: gaussian(x, y, sigma), unbiased=False)


def clip_mmd_shares(a: Array, b: Array, sigma: float = 10.0) -> Array:
    """What each row of ``a`` ``(N, d)`` has to do with its CMMD to ``b``: ``(N,)``.

    With ``g(x) = mean k(x, a) - mean k(x, b)``, large where ``a`` is crowded and ``b`` is not::

        share(x) = CMMD + 2000 (g(x) - mean g)

    which is the distance linearised in the distribution of ``a``: the mean is the CMMD itself, and
    the standard error of the mean is the CMMD's to first order.
    """
    _check(a, b)
    one, two = unit(a), unit(b)

    def mean_kernel(y: Array) -> Array:
        return np.concatenate([gaussian(x, y, sigma).mean(1) for x in _blocks(one)])

    crowded = mean_kernel(one) - mean_kernel(two)
    return np.asarray(clip_mmd(a, b, sigma) + 2000 * (crowded - crowded.mean()))


def unit(features: Array) -> Array:
    """Rows of length 1, in double precision."""
    x = np.asarray(features, np.float64)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def polynomial(a: Array, b: Array) -> Array:
    """``(a.b / d + 1)^3`` of all pairs of rows."""
    base = a @ b.T / a.shape[1] + 1
    return np.asarray(base * base * base)  # many times as fast as a power


def gaussian(a: Array, b: Array, sigma: float) -> Array:
    """``exp(-|a - b|^2 / (2 sigma^2))`` of all pairs of rows."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.asarray(np.exp(-np.maximum(squares, 0) / (2 * sigma**2)))


def prompt_diversity(features: Array, prompts: Sequence[str]) -> float | None:
    """Mean of ``1 - cos`` over pairs of pictures of a prompt, then over prompts.

    ``None`` where no prompt has two pictures. A generator that draws one picture again and again
    is at 0, whatever its scores.
    """
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    found = [distances_to_others(features[rows]).mean() for rows in groups.values() if rows[1:]]
    return float(np.mean(found)) if found else None


def distances_to_others(features: Array) -> Array:
    """For each row of ``(n, d)`` the mean of ``1 - cos`` to the others, ``(n,)``.

    Raises:
        ValueError: there are no others.
    """
    n = len(features)
    if n < 2:
        raise ValueError(f"distances need two pictures or more, got {n}")
    directions = unit(features)
    cosine = directions @ directions.T
    return np.asarray(1 - (cosine.sum(1) - np.diagonal(cosine)) / (n - 1))


def vendi_score(features: Array) -> float:
    """The effective number of different pictures among the rows of ``(n, d)``, from 1 to ``n``."""
    directions = unit(features)
    # X X^T and X^T X have the same eigenvalues but for zeros: the smaller one is enough.
    wide = directions.shape[0] <= directions.shape[1]
    gram = directions @ directions.T if wide else directions.T @ directions
    shares = np.linalg.eigvalsh(gram / len(directions))
    shares = shares[shares > 1e-12]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _blocks(x: Array, rows: int = ROWS) -> Iterator[Array]:
    return (x[k : k + rows] for k in range(0, len(x), rows))


def _total(a: Array, b: Array, kernel: Kernel) -> float:
    """The sum over all pairs, without ever holding all of them."""
    return float(sum(kernel(x, b).sum() for x in _blocks(a)))


def _diagonal(x: Array, kernel: Kernel) -> float:
    return float(sum(np.trace(kernel(y, y)) for y in _blocks(x, 128)))


def _check(a: Array, b: Array) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features must be (N, d) and (M, d) with N, M of 2 or more, got {a.shape}, {b.shape}"
        )
