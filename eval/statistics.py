"""Bootstrap intervals for means, means over tasks, and paired differences.

Samples of one prompt are not independent, so prompts are what is resampled: a replicate draws
prompts with replacement and takes all their samples.  Three details keep the intervals honest
where there is little data:

* a task with fewer than :data:`MIN_CLUSTERS` prompts says nothing about other prompts, and
  resampling one or two prompts would give an interval of width zero; there samples are resampled,
  and the interval says so (``unit == "sample"``);
* replicates draw ``n - 1`` of ``n`` units (Rao & Wu 1988, "Resampling inference with complex
  survey data"), which makes the variance of the replicates unbiased; drawing ``n`` is too narrow;
* a task that is all right or all wrong (every value 1, or every value 0) has no spread to
  resample; its replicates come from the Jeffreys posterior ``Beta(k + 1/2, n - k + 1/2)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

MIN_CLUSTERS = 10  # fewer prompts than this: resample samples, not prompts
Unit = Literal["prompt", "sample", "none"]
Values = Sequence[float] | np.ndarray
Clusters = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval.

    Attributes:
        mean: the plain mean (over tasks: the mean of the task means); NaN without samples.
        low, high: percentile interval around it; NaN where the data cannot give one.
        n: number of samples.
        clusters: number of distinct prompts.
        unit: what was resampled; ``none`` where there was nothing to resample.
        level: nominal coverage.
    """

    mean: float
    low: float
    high: float
    n: int
    clusters: int = 0
    unit: Unit = "sample"
    level: float = 0.95

    @property
    def defined(self) -> bool:
        """Whether the data gave an interval, not only a mean."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; an undefined number becomes ``null``."""
        return {k: _null(v) for k, v in self.__dict__.items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Interval:
        """Inverse of :meth:`to_json`."""
        numbers = {k: math.nan if data[k] is None else float(data[k]) for k in _NUMBERS}
        return Interval(**{**data, **numbers})


@dataclass(frozen=True)
class Difference:
    """After minus before, paired by key.

    Attributes:
        interval: of the mean over tasks of the mean paired difference.
        before, after: means over tasks of the same pairs.
        tasks: the interval of each task.
        pairs: number of pairs.
        changed: pairs whose value differs.
        excludes_zero: whether the interval excludes zero *and* enough pairs changed for any test
            at this level to say so (six at 95 %: fewer cannot pass even a sign test, while a
            bootstrap of a handful of one-sided changes would claim an effect).
    """

    interval: Interval
    before: float
    after: float
    tasks: Mapping[str, Interval] = field(default_factory=dict)
    pairs: int = 0
    changed: int = 0
    excludes_zero: bool = False


def bootstrap_mean(
    values: Values,
    clusters: Clusters | None = None,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of ``values`` ``(N,)`` with a bootstrap interval clustered by ``clusters`` ``(N,)``.

    With fewer than :data:`MIN_CLUSTERS` distinct clusters (a task of a few prompts), or without
    ``clusters``, samples are resampled instead; ``unit`` of the result says which.  A single value
    other than 0 or 1 has a mean and no interval.

    Raises:
        ValueError: a value is not finite, lengths differ, or ``level`` is outside (0, 1).
    """
    drawn = _draw(values, clusters, samples, np.random.default_rng(seed), shares=True)
    return _interval(drawn, level)


def bootstrap_task_mean(
    tasks: Mapping[str, tuple[Values, Clusters | None]],
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The mean over tasks of the task means, resampled within each task (stratified).

    Args:
        tasks: task name to ``(values, clusters)``, each ``(N_task,)``.  Tasks with fewer than
            :data:`MIN_CLUSTERS` prompts resample samples, as in :func:`bootstrap_mean`; ``unit``
            is then ``sample`` if that holds for every task.

    The mean is NaN if a task has no samples: a mean over the other tasks is a different quantity.
    """
    rng = np.random.default_rng(seed)
    drawn = [_draw(*tasks[t], samples, rng, shares=True) for t in sorted(tasks)]
    return _interval(_mean_of(drawn), level)


def paired_difference(
    before: Mapping[str, float],
    after: Mapping[str, float],
    clusters: Mapping[str, Any],
    tasks: Mapping[str, str],
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Mean over tasks of ``after - before``, paired by key, with the scheme of the task mean.

    Args:
        before, after: key to value, with equal keys.
        clusters: key to prompt.
        tasks: key to task.

    Raises:
        ValueError: the keys differ, or there are none.
    """
    _same_keys(before, after)
    keys: dict[str, list[str]] = {}
    for key in sorted(before):
        keys.setdefault(tasks[key], []).append(key)
    rng = np.random.default_rng(seed)
    drawn: dict[str, _Draws] = {}
    for task in sorted(keys):
        change = [after[k] - before[k] for k in keys[task]]
        drawn[task] = _draw(change, [clusters[k] for k in keys[task]], samples, rng, shares=False)
    interval = _interval(_mean_of(list(drawn.values())), level)
    changed = sum(after[k] != before[k] for k in before)
    nonzero = interval.defined and (interval.low > 0 or interval.high < 0)
    return Difference(
        interval=interval,
        before=_task_mean(before, keys),
        after=_task_mean(after, keys),
        tasks={t: _interval(d, level) for t, d in drawn.items()},
        pairs=len(before),
        changed=changed,
        excludes_zero=nonzero and changed >= fewest_changes(level),
    )


def fewest_changes(level: float = 0.95) -> int:
    """The fewest changed pairs with which a two-sided sign test can reach ``level``."""
    return math.ceil(math.log2(2 / (1 - level)))


@dataclass(frozen=True)
class _Draws:
    """A mean, its bootstrap replicates ``(samples,)`` (NaN: undefined) and where they come from."""

    mean: float
    replicates: np.ndarray
    n: int
    clusters: int
    unit: Unit


def _draw(
    values: Values,
    clusters: Clusters | None,
    samples: int,
    rng: np.random.Generator,
    shares: bool,
) -> _Draws:
    """Replicates of one task. ``shares``: 0 and 1 mean wrong and right (not so for differences)."""
    x = np.asarray(values, np.float64)
    if not np.isfinite(x).all():
        raise ValueError("values to average must be finite; leave unscored samples out")
    codes, distinct = _codes(clusters, len(x))
    unit: Unit = "prompt" if distinct >= MIN_CLUSTERS and clusters is not None else "sample"
    if unit == "sample":
        codes = np.arange(len(x))
    sums, counts = np.bincount(codes, x), np.bincount(codes)
    units = len(sums)
    mean = float(x.mean()) if len(x) else math.nan
    if shares and len(x) and (x == x[0]).all() and x[0] in (0.0, 1.0):
        right = units * x[0]
        replicates = rng.beta(right + 0.5, units - right + 0.5, samples)
    elif units < 2:
        replicates, unit = np.full(samples, math.nan), "none"
    else:
        times = rng.multinomial(units - 1, np.full(units, 1 / units), samples)
        replicates = (times @ sums) / (times @ counts)
    return _Draws(mean, replicates, len(x), distinct, unit)


def _codes(clusters: Clusters | None, n: int) -> tuple[np.ndarray, int]:
    if clusters is None:
        return np.arange(n), n
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} clusters for {n} values")
    index: dict[Any, int] = {}
    codes = [index.setdefault(c, len(index)) for c in clusters]
    return np.asarray(codes, np.int64), len(index)


def _mean_of(drawn: Sequence[_Draws]) -> _Draws:
    if not drawn:
        return _Draws(math.nan, np.full(1, math.nan), 0, 0, "none")
    units = {d.unit for d in drawn}
    unit: Unit = "none" if "none" in units else "prompt" if "prompt" in units else "sample"
    return _Draws(
        mean=float(np.mean([d.mean for d in drawn])),
        replicates=np.mean([d.replicates for d in drawn], axis=0),
        n=sum(d.n for d in drawn),
        clusters=sum(d.clusters for d in drawn),
        unit=unit,
    )


def _interval(drawn: _Draws, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    low, high = np.quantile(drawn.replicates, [(1 - level) / 2, (1 + level) / 2])
    # The Jeffreys draws of an all-right task lie below 1; an interval must hold its own mean.
    low, high = min(low, drawn.mean), max(high, drawn.mean)
    if not np.isfinite(drawn.replicates).all():
        low = high = math.nan
    sizes = (drawn.n, drawn.clusters, drawn.unit)
    return Interval(drawn.mean, float(low), float(high), *sizes, level)


def _task_mean(values: Mapping[str, float], keys: Mapping[str, Sequence[str]]) -> float:
    return float(np.mean([np.mean([values[k] for k in ks]) for ks in keys.values()]))


def _same_keys(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    if not before:
        raise ValueError("a paired difference needs at least one pair")
    odd = sorted(set(before) ^ set(after))
    if odd:
        shown = ", ".join(odd[:3])
        raise ValueError(f"{len(odd)} keys are on one side only (such as {shown}): not paired")


_NUMBERS = ("mean", "low", "high")


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
