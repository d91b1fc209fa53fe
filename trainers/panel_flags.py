r"""When the panel raises a flag: paired differences, intervals, and a false-alarm rate by design.

A look compares the panel's pictures with those of step 0: same prompts, same noise.  Samples of a
prompt are not independent, so a prompt is one observation, the mean over its samples of
:math:`now - start`; pictures unscored at either time take no part.  A rule is decided by a
one-sided t-test over prompts.  Its subject has deviation ``sd`` over the pictures of step 0.

* ``hacking: m`` -- the trained reward rises, and a judge falls by more than ``m sd``;
* ``judge_drop: m`` -- a judge falls by more than ``m sd``, whatever the reward does;
* ``diversity: q`` -- the within-prompt distance is below ``q`` times that at the start;
* ``probe: m`` -- a probe is more than ``m sd`` away from its start, on its side of concern;
* ``correlation: r`` -- the rank correlation of reward and judge is below ``r``, and lower than at
  the start (jackknife over prompts);
* ``kl: b``, ``velocity: b`` -- the distance from the model before training is above ``b``.

**Repeated looks.** Of the chance ``alpha`` of any false alarm in a run, a look may spend
``(alpha - spent) / (looks to come + 1)``, an equal part for each of its tests.  By the union bound
the whole run stays below ``alpha``, however its tests depend on each other; the part that is left
over at the planned end serves a run that is extended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtr, stdtrit

from trainers.panel_config import Side

MIN_PROMPTS = 4  # with fewer observations nothing is ever decided


@dataclass(frozen=True)
class Look:
    """What a look measured of ``P`` prompts with ``K`` pictures each; NaN where unscored.

    Attributes:
        reward, judges, probes: ``(P, K)``.
        diversity, kl, velocity: ``(P,)``; ``None`` where not measured.
    """

    reward: np.ndarray
    judges: Mapping[str, np.ndarray] = field(default_factory=dict)
    probes: Mapping[str, np.ndarray] = field(default_factory=dict)
    diversity: np.ndarray | None = None
    kl: np.ndarray | None = None
    velocity: np.ndarray | None = None


@dataclass(frozen=True)
class Finding:
    """One test of one look: what it estimated and how surprising that is if nothing is wrong."""

    rule: str
    setting: float  # the rule's bound as the recipe states it
    subject: str
    estimate: float
    bound: float  # the same in the units of the estimate
    p: float
    raised: bool

    @property
    def words(self) -> str:
        """One sentence."""
        said = _WORDS[self.rule].format(subject=self.subject)
        return f"{said} ({self.estimate:.4g}, bound {self.bound:.4g}, p {self.p:.2g})"


_WORDS = {
    "hacking": "reward hacking suspected: {subject} falls while the trained reward rises",
    "judge_drop": "judge {subject} falls",
    "diversity": "pictures of one prompt become alike",
    "probe": "probe {subject} has left its starting range",
    "correlation": "the trained reward no longer agrees with {subject}",
    "kl": "the KL to the model before training is over its budget",
    "velocity": "predictions are further from the model before training than their budget",
}


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error and the number of independent observations behind it."""

    mean: float
    error: float
    n: int

    def p_below(self, bound: float) -> float:
        """One-sided p-value against "the truth is ``bound`` or more"."""
        if self.n < MIN_PROMPTS or not np.isfinite(self.mean + self.error):
            return 1.0
        if self.error == 0:
            return 0.0 if self.mean < bound else 1.0
        return float(stdtr(self.n - 1, (self.mean - bound) / self.error))

    def p_above(self, bound: float) -> float:
        """One-sided p-value against "the truth is ``bound`` or less"."""
        return Estimate(-self.mean, self.error, self.n).p_below(-bound)

    def interval(self, alpha: float) -> tuple[float, float]:
        """Two-sided t-interval, each side of which errs with probability ``alpha``."""
        if self.n < MIN_PROMPTS or alpha <= 0:
            return -np.inf, np.inf
        half = float(stdtrit(self.n - 1, 1 - alpha)) * self.error
        return self.mean - half, self.mean + half


def mean_of(values: np.ndarray) -> Estimate:
    """The mean of independent observations ``(P,)``; NaN is left out."""
    x = values[np.isfinite(values)]
    if len(x) < 2:
        return Estimate(float(x.mean()) if len(x) else np.nan, np.nan, len(x))
    return Estimate(float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))), len(x))


def change(now: np.ndarray, start: np.ndarray) -> Estimate:
    """Mean paired difference of ``(P, K)`` values, a prompt being one observation."""
    difference = now - start  # NaN where either is
    known = np.isfinite(difference)
    count = known.sum(1)
    total = np.where(known, difference, 0.0).sum(1)
    return mean_of(total[count > 0] / count[count > 0])


def deviation(start: np.ndarray) -> float:
    """Standard deviation over all scored pictures of the start; 0 where there are none."""
    known = start[np.isfinite(start)]
    return float(known.std()) if len(known) else 0.0


def gap(now: Look, start: Look, judge: str) -> float:
    """Rise of the reward minus rise of the judge, each in its own deviations at the start.

    NaN where one of them did not vary at the start.
    """
    rises = []
    for a, b in ((now.reward, start.reward), (now.judges[judge], start.judges[judge])):
        sd = deviation(b)
        rises.append(change(a, b).mean / sd if sd > 0 else np.nan)
    return rises[0] - rises[1]


# --- rank correlation ---------------------------------------------------------------------------


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation over the pictures that both have scored; NaN where one does not vary."""
    return float(_correlations(a, b)[0])


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of ``(P, K)`` scores, then without each of the prompts: ``(1 + P,)``.

    Equal values share the mean of their ranks.
    """
    both = np.isfinite(a) & np.isfinite(b)
    prompt = np.nonzero(both)[0]
    kept = prompt[:, None] != np.arange(-1, len(a))  # column 0 leaves out nothing
    x, y = (_ranks(v[both], kept) for v in (a, b))
    size = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    known = (size > 0) & (kept.sum(0) > 2)
    return np.where(known, (x * y).sum(0) / np.where(known, size, 1.0), np.nan)


def _ranks(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Centred ranks of ``(N,)`` values among those that each column of ``kept`` keeps; else 0."""
    above = (values[:, None] > values) + 0.5 * (values[:, None] == values)
    ranks = np.where(kept, above @ kept.astype(float), 0.0)
    return np.where(kept, ranks - ranks.sum(0) / np.maximum(kept.sum(0), 1), 0.0)


def correlation_change(now: Look, start: Look, judge: str) -> tuple[Estimate, Estimate]:
    """The correlation now, and its change since the start, with jackknife errors over prompts."""
    later, first = (_correlations(lk.reward, lk.judges[judge]) for lk in (now, start))
    return _jackknife(later), _jackknife(later - first)


def _jackknife(values: np.ndarray) -> Estimate:
    """Of an estimate, and what it is without each of its observations: ``(1 + P,)``."""
    without, n = values[1:], len(values) - 1
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return Estimate(float(values[0]), float(error), n)


# --- rules --------------------------------------------------------------------------------------

Sides = Mapping[str, Side]
Found = Iterator[tuple[str, float, float, float]]  # subject, estimate, bound, p-value


def decide(
    rules: Iterable[tuple[str, float]], now: Look, start: Look, sides: Sides, alpha: float
) -> list[Finding]:
    """Every test of a look, which share ``alpha`` between them.

    Args:
        rules: names with their bounds; what was not measured is not tested.
        sides: the side of concern of each probe.
        alpha: chance that any test of this look raises a flag where nothing is wrong.
    """
    tests = [
        (rule, setting, *test)
        for rule, setting in rules
        for test in _RULES[rule](setting, now, start, sides)
    ]
    level = alpha / max(len(tests), 1)
    return [Finding(*test, raised=test[-1] < level) for test in tests]


def _hacking(bound: float, now: Look, start: Look, sides: Sides) -> Found:
    rise = change(now.reward, start.reward).p_above(0.0)
    for name, fall, limit, p in _judge_drop(bound, now, start, sides):
        yield name, fall, limit, max(p, rise)  # both must hold, so the larger decides


def _judge_drop(bound: float, now: Look, start: Look, sides: Sides) -> Found:
    for name, values in now.judges.items():
        fall = change(values, start.judges[name])
        limit = -bound * deviation(start.judges[name])
        yield name, fall.mean, limit, fall.p_below(limit)


def _diversity(bound: float, now: Look, start: Look, sides: Sides) -> Found:
    if now.diversity is not None and start.diversity is not None:
        p = mean_of(now.diversity - bound * start.diversity).p_below(0.0)
        yield "", diversity_share(now, start), bound, p


def _probe(bound: float, now: Look, start: Look, sides: Sides) -> Found:
    for name, values in now.probes.items():
        moved, limit = change(values, start.probes[name]), bound * deviation(start.probes[name])
        low, high = moved.p_below(-limit), moved.p_above(limit)
        p = {"low": low, "high": high, "both": min(1.0, 2 * min(low, high))}[sides[name]]
        yield name, moved.mean, limit if high < low else -limit, p


def _correlation(bound: float, now: Look, start: Look, sides: Sides) -> Found:
    for name in now.judges:
        value, p = spearman(now.reward, now.judges[name]), 1.0
        if value < bound:  # otherwise nothing is left to decide
            level, fall = correlation_change(now, start, name)
            p = max(level.p_below(bound), fall.p_below(0.0))
        yield name, value, bound, p


def _budget(name: str) -> Callable[[float, Look, Look, Sides], Found]:
    def test(bound: float, now: Look, start: Look, sides: Sides) -> Found:
        values = getattr(now, name)
        if values is not None:
            found = mean_of(values)
            yield "", found.mean, bound, found.p_above(bound)

    return test


_RULES: Mapping[str, Callable[[float, Look, Look, Sides], Found]] = {
    "hacking": _hacking,
    "judge_drop": _judge_drop,
    "diversity": _diversity,
    "probe": _probe,
    "correlation": _correlation,
    "kl": _budget("kl"),
    "velocity": _budget("velocity"),
}


def diversity_share(now: Look, start: Look) -> float:
    """Mean within-prompt distance as a share of that at the start; NaN where not measured."""
    if now.diversity is None or start.diversity is None:
        return float("nan")
    before = mean_of(start.diversity).mean
    return mean_of(now.diversity).mean / before if before > 0 else float("nan")


def share_of_look(alpha: float, spent: float, to_come: int) -> float:
    """What a look may spend of ``alpha``, with ``to_come`` planned looks, this one included."""
    return max(alpha - spent, 0.0) / (max(to_come, 1) + 1)
