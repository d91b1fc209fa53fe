r"""Intervals over training runs: few seeds, many pictures, every run judged on the same pictures.

Two things are random in a mean over the runs of a method: the seed of the training and the prompts
that were asked for.  Each is resampled by itself, in strata: seeds within each method, prompts
within each task, with the same draw of prompts for all methods, which pairs them.  A replicate of a
statistic is

.. math:: \hat\theta + c\,(\theta_\text{seeds} - \hat\theta)
          + f\,(\theta_\text{prompts} - \hat\theta).

* Draws take ``n - 1`` of ``n`` units, which makes the variance of a mean unbiased, as in
  :mod:`eval.statistics`.
* ``c`` is Student's quantile over the normal one, with the seeds' degrees of freedom: three seeds
  know little about their own spread, and a plain percentile interval of them is too narrow
  (Hesterberg 2015, "What teachers should know about the bootstrap").  Methods differ in how much
  their seeds differ, so with ``V_m`` the variance when those of method ``m`` alone are redrawn the
  degrees are Welch's, :math:`(\sum_m V_m)^2 / \sum_m V_m^2 / (S_m - 1)`.
* Where the variance of a method's seeds is known better than from its own few
  (:mod:`eval.seed_spread`), the first part is a normal draw of the known variances, and the degrees
  in Welch's formula are theirs.
* The noise of single pictures shows up in both parts.  ``f`` removes it from the second: with
  ``V`` the variance over prompts of the statistic of all seeds and ``V_1`` that of single seeds,
  the noise's share of ``V`` is ``(V_1 - V) / (S - 1)``, and ``f^2 = 1 - (V_1 - V) / ((S - 1) V)``.

The interquartile mean and the probability of improvement are those of Agarwal et al. (2108.13264),
who resample the runs of each task by itself; here a run covers all tasks and is drawn as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from eval.statistics import MIN_CLUSTERS, Interval

# One array (R, S, T, P, Q) for each method: replicates, seeds, tasks, points, measures -> (R,).
Statistic = Callable[..., np.ndarray]
SAMPLES = 1000


@dataclass(frozen=True)
class Pictures:
    """What every run is judged on: the task and the prompt of each of ``K`` pictures."""

    tasks: tuple[str, ...]
    prompts: tuple[str, ...]

    def strata(self) -> list[np.ndarray]:
        """Picture numbers of each task, in order of appearance."""
        names = list(dict.fromkeys(self.tasks))
        return [np.flatnonzero([t == name for t in self.tasks]) for name in names]

    def draw(self, samples: int, rng: np.random.Generator) -> np.ndarray:
        """Weights ``(samples, K)`` that sum to 1 in each task; NaN where a task has one picture."""
        weights = np.full((samples, len(self.tasks)), math.nan)
        for own in self.strata():
            distinct, codes = np.unique([self.prompts[k] for k in own], return_inverse=True)
            if len(distinct) < MIN_CLUSTERS:  # as in eval.statistics: too few prompts to resample
                codes = np.arange(len(own))
            units = int(codes.max()) + 1
            if units > 1:
                times = rng.multinomial(units - 1, np.full(units, 1 / units), samples)
                picked = times[:, codes].astype(float)
                weights[:, own] = picked / picked.sum(1, keepdims=True)
        return weights

    def cells(self, values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Task means ``(R, S, T, P, Q)`` of ``(S, P, K, Q)`` values; plain ones without weights."""
        if weights is None:
            means = [values[:, :, own].mean(2) for own in self.strata()]
            return np.stack(means, 1)[None]
        found = [np.einsum("rk,spkq->rspq", weights[:, own], values[:, :, own], optimize=True)
                 for own in self.strata()]  # fmt: skip
        return np.stack(found, 2)


def interval_of(
    statistic: Statistic,
    runs: Sequence[np.ndarray],
    pictures: Pictures,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    known: Sequence[tuple[float, float]] = (),
) -> Interval:
    """A statistic of one or more methods with its interval over seeds and prompts.

    Args:
        statistic: see :data:`Statistic`.
        runs: ``(S, P, K, Q)`` of each method; the numbers of seeds may differ.
        bounds: what the statistic cannot leave, such as 0 and 1 for a share.
        known: of each method, the variance that its seeds give the statistic and the degrees of
            freedom of that; without it both come from the method's own seeds.

    A method with a single seed leaves the interval undefined: nothing is known of its spread.
    """
    rng = np.random.default_rng(seed)
    point = [pictures.cells(r) for r in runs]
    mean = float(statistic(*point)[0])
    sizes = (sum(r.shape[0] * r.shape[2] for r in runs), len(set(pictures.prompts)))
    if min(map(len, runs)) < 2:
        return Interval(mean, math.nan, math.nan, *sizes, "none", level)
    if known:
        variances, own = np.array(known, float).T
        seeds, freedom = rng.normal(0, math.sqrt(variances.sum()), samples), _welch(variances, own)
    else:
        redrawn = [_redrawn(cells[0], samples, rng) for cells in point]
        seeds, freedom = statistic(*redrawn) - mean, _freedom(statistic, redrawn, point)
    weights = pictures.draw(samples, rng)
    prompts = statistic(*[pictures.cells(r, weights) for r in runs]) - mean
    alone = [
        statistic(*[pictures.cells(r[s : s + 1], weights) for r in runs]).var()
        for s in range(min(map(len, runs)))
    ]
    widen = stats.t.ppf((1 + level) / 2, freedom) / stats.norm.ppf((1 + level) / 2)
    drawn = mean + widen * seeds + _own_share(prompts.var(), alone) * prompts
    return _between(mean, drawn, sizes, level, bounds)


def interval_over_prompts(
    statistic: Statistic,
    runs: Sequence[np.ndarray],
    pictures: Pictures,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """As :func:`interval_of`, where seeds are nothing but further noise for the same prompts.

    Nothing is common to the pictures of a seed then, so seeds are further samples of each prompt,
    and prompts, with all their samples and the same for all methods, are what is drawn anew.

    Args:
        runs: ``(S, P, K, Q)`` of each method, with one number of seeds.

    Raises:
        ValueError: the numbers of seeds differ, so that pictures cannot be paired.
    """
    seeds = {len(r) for r in runs}
    if len(seeds) != 1:
        raise ValueError(f"methods have {sorted(seeds)} seeds; pairs need the same ones for each")
    times = seeds.pop()
    folded = [np.concatenate(list(r), 1)[None] for r in runs]
    every = Pictures(pictures.tasks * times, pictures.prompts * times)
    mean = float(statistic(*[every.cells(r) for r in folded])[0])
    weights = every.draw(samples, np.random.default_rng(seed))
    drawn = statistic(*[every.cells(r, weights) for r in folded])
    sizes = (sum(r.shape[2] for r in folded), len(set(pictures.prompts)))
    return _between(mean, drawn, sizes, level, bounds)


def _between(
    mean: float,
    drawn: np.ndarray,
    sizes: tuple[int, int],
    level: float,
    bounds: tuple[float, float],
) -> Interval:
    """The interval that the middle ``level`` of the draws spans; undefined where one is."""
    if not np.isfinite(drawn).all():
        return Interval(mean, math.nan, math.nan, *sizes, "none", level)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).clip(*bounds)
    return Interval(mean, min(float(low), mean), max(float(high), mean), *sizes, "prompt", level)


def _redrawn(cells: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """``(S, ...)`` with ``S - 1`` seeds drawn anew for each replicate: ``(R, S - 1, ...)``."""
    return np.asarray(cells[rng.integers(len(cells), size=(samples, len(cells) - 1))])


def _freedom(
    statistic: Statistic, redrawn: Sequence[np.ndarray], point: Sequence[np.ndarray]
) -> float:
    """Degrees of freedom of the seeds, by Welch and Satterthwaite; see the module.

    Those of all methods together would be right only where their seeds spread alike: beside a
    method without any spread, the few seeds of another still know no more about their own.
    """
    own = np.array([cells.shape[1] - 1 for cells in point], float)
    if len(point) == 1:
        return float(own[0])
    held = [np.broadcast_to(p, (len(r), *p.shape[1:])) for p, r in zip(point, redrawn, strict=True)]
    variances = np.array([
        statistic(*[r if m == k else h for k, (r, h) in enumerate(zip(redrawn, held, strict=True))])
        .var()
        for m in range(len(point))
    ])  # fmt: skip
    return _welch(variances, own)


def _welch(variances: np.ndarray, own: np.ndarray) -> float:
    """Degrees of freedom of a sum of parts whose variances are known with ``own`` degrees each."""
    unsure = float((variances**2 / own).sum())
    together = float(variances.sum())
    if together <= 0:
        return float(own.min())
    return together**2 / unsure if unsure > 0 else math.inf


def _own_share(together: float, alone: Sequence[float]) -> float:
    """``f``: what of the spread over prompts is not the noise of single pictures."""
    if together <= 0 or not math.isfinite(together):
        return 1.0
    noise = (float(np.mean(alone)) - together) / (len(alone) - 1)
    return math.sqrt(min(1.0, max(0.0, 1 - noise / together)))


def iqm(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis; order statistics on the edge count in part."""
    n = values.shape[-1]
    at = np.arange(n)
    weights = np.clip(np.minimum(at + 1, 0.75 * n) - np.maximum(at, 0.25 * n), 0, None)
    return np.asarray(np.sort(values, -1) @ weights / (n / 2))


def end_iqm(measure: int = 0) -> Statistic:
    """Interquartile mean over seeds x tasks at the last point."""

    def statistic(cells: np.ndarray) -> np.ndarray:
        return iqm(cells[..., -1, measure].reshape(len(cells), -1))

    return statistic


def end_improvement(measure: int = 0) -> Statistic:
    """Probability, mean over tasks, that a run of the first method ends above one of the second.

    Ties count one half.
    """

    def statistic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        one, two = a[:, :, None, :, -1, measure], b[:, None, :, :, -1, measure]
        return np.asarray(((one > two) + 0.5 * (one == two)).mean((1, 2, 3)))

    return statistic
