r"""Claims of papers, each decided by one interval and by nothing else.

A claim compares a statistic of method ``better`` with that of ``than``.  It is *supported* where
the whole interval of the difference lies above ``margin``, *not supported* where the whole interval
lies below, else *undecided*.  A margin below 0 asks for no loss larger than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eval.methods.read import Comparison
from eval.methods.spreads import at_end, gained, known_variances, over_curve
from eval.run_statistics import Statistic
from eval.statistics import Interval
from mmalign.config import ConfigError, from_dict

Word = Literal["supported", "not supported", "undecided"]
At = Literal[
    "end", "curve", "gain", "equal_nfe", "equal_time", "equal_updates", "equal_proxy", "minimum"
]  # fmt: skip
LEAST_SEEDS = 3  # of training, for a verdict
HOW: Mapping[At, str] = {
    "end": "at the end of the budget",
    "curve": "mean over the points of the budget",
    "gain": "gain over the start, at the end of the budget",
    "equal_nfe": "at the most evaluations that both reach",
    "equal_time": "in the most seconds that both reach",
    "equal_updates": "after the most updates that both make",
    "equal_proxy": "where both have reached the same proxy",
    "minimum": "least gain among the rewards, each in deviations of the base's pictures",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim.

    ``at``: ``end``; ``curve``, the mean over all points after the start, which is higher for who
    gets there with fewer evaluations; ``gain``, of the end over the start, against ``share`` times
    that of ``than`` (0: against none at all); ``equal_nfe``, ``equal_time`` and ``equal_updates``,
    at the most evaluations, seconds or updates that both reach, where methods differ in them;
    ``equal_proxy``, at the highest value of ``proxy`` that both reach; ``minimum``, the least of
    the gains of ``parts``.
    """

    says: str
    better: str
    than: str
    measure: str = "accuracy"
    at: At = "end"
    proxy: str = "partial"
    parts: tuple[str, ...] = ()
    margin: float = 0.0
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.share != 1.0 and self.at != "gain":
            raise ConfigError(
                f"claim {self.says!r}: 'share' is {self.share}, which belongs to at: gain"
            )
        if (self.at == "minimum") != bool(self.parts):
            raise ConfigError(
                f"claim {self.says!r}: 'parts' belong to at: minimum, and at: minimum needs them"
            )

    @property
    def measures(self) -> tuple[str, ...]:
        """What pictures have to be judged by."""
        if self.parts:
            return self.parts
        return (self.measure, self.proxy) if self.at == "equal_proxy" else (self.measure,)


@dataclass(frozen=True)
class Decided:
    """A claim with the interval of its difference and the word that follows from it."""

    claim: Claim
    interval: Interval | None
    word: Word
    why: str = ""


def read_claims(claims: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """The claims of a table.

    Raises:
        ConfigError: an unknown key or an impossible combination.
    """
    return [from_dict(Claim, claim) for claim in claims]


def decide(comparison: Comparison, claim: Claim, seed: int = 0) -> Decided:
    """The verdict on a claim; undecided where a side has no runs or too few seeds.

    The interval is there where both sides have runs, so that what is missing can be judged.
    """
    sides = (claim.better, claim.than)
    for side in sides:
        if side not in comparison.methods:
            return Decided(claim, None, "undecided", f"no finished run of {side}")
    if comparison.steering and len({len(comparison.methods[s].runs) for s in sides}) > 1:
        return Decided(claim, None, "undecided", "seeds of a side are not finished")
    found = _interval(comparison, claim, seed)
    if found is None:
        return Decided(claim, None, "undecided", "some pictures could not be judged")
    lacking = next(filter(None, (lacks(comparison, side) for side in sides)), "")
    if not found.defined:
        lacking = lacking or "takes two seeds of each side"
    return Decided(claim, found, "undecided" if lacking else verdict(found, claim.margin), lacking)


def lacks(comparison: Comparison, name: str) -> str:
    """Why no verdict may be given on a method yet; empty where one may.

    Judged by those of its planned seeds that are finished, a method that fails now and then would
    be judged by its luck, and two seeds know next to nothing of their spread. Seeds of steering
    are further samples of the same prompts, and need neither.
    """
    if comparison.steering:
        return ""
    done = {run.seed for run in comparison.methods[name].runs}
    missing = [str(s) for s in comparison.table["seeds"] if s not in done]
    if missing:
        return f"{name} lacks seed {', '.join(missing)}"
    return f"{name} has {len(done)} of {LEAST_SEEDS} seeds" if len(done) < LEAST_SEEDS else ""


def _interval(comparison: Comparison, claim: Claim, seed: int) -> Interval | None:
    """Of the claim's difference; none where pictures could not be judged."""
    # Against nothing it is one method, whose seeds must count once.
    sides = (claim.better, claim.than) if claim.share else (claim.better,)
    grid, unit = _where(comparison, claim)
    runs = [comparison.values(side, claim.measures, grid, unit) for side in sides]
    if any(np.isnan(r).any() for r in runs):
        return None
    return comparison.interval(
        statistic_of(claim, runs[0]), runs, seed=seed, known=_known(comparison, claim)
    )


def _known(comparison: Comparison, claim: Claim) -> list[tuple[float, float]]:
    """What all methods say about the seeds of these; nothing where the statistic is no mean."""
    of = {"end": at_end, "gain": gained, "curve": over_curve}.get(claim.at)
    if of is None:
        return []
    sides = [(claim.better, 1.0)]
    if claim.share:
        sides.append((claim.than, claim.share))
    return known_variances(comparison, of, sides, claim.measure)


def _where(comparison: Comparison, claim: Claim) -> tuple[np.ndarray | None, str]:
    """The points at which both sides are looked at, and their unit; ``None`` is all of them."""
    unit = {"equal_time": "seconds", "equal_updates": "steps"}.get(claim.at, "nfe")
    if claim.at not in ("equal_nfe", "equal_time", "equal_updates"):
        return None, unit
    return np.array([comparison.reached((claim.better, claim.than), unit)]), unit


def verdict(interval: Interval, margin: float = 0.0) -> Word:
    """What an interval of a difference says about "larger than the margin"."""
    if interval.defined and interval.low > margin:
        return "supported"
    return "not supported" if interval.defined and interval.high < margin else "undecided"


def gain(comparison: Comparison, name: str, measure: str = "accuracy") -> Interval:
    """End minus start of a method, over its seeds, on the same pictures."""
    known = known_variances(comparison, gained, [(name, 1.0)], measure)
    return comparison.interval(_gain, [comparison.values(name, (measure,))], known=known)


def statistic_of(claim: Claim, values: np.ndarray) -> Statistic:
    """The difference that a claim is about; ``values`` ``(S, P, K, Q)`` give units to its parts."""
    if claim.at == "minimum":
        return _least_gain(values[0, 0].std(0))
    if claim.share == 0:
        return _gain
    if claim.at == "gain":
        return lambda a, b: _gain(a) - claim.share * _gain(b)
    return {"curve": _curve, "equal_proxy": _at_equal_proxy}.get(claim.at, _end)


def _mean(cells: np.ndarray) -> np.ndarray:
    """``(R, P, Q)``: over seeds and tasks."""
    return np.asarray(cells.mean((1, 2)))


def _gain(cells: np.ndarray) -> np.ndarray:
    return gained(_mean(cells)[..., 0])


def _end(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return at_end(_mean(a)[..., 0]) - at_end(_mean(b)[..., 0])


def _curve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return over_curve(_mean(a)[..., 0]) - over_curve(_mean(b)[..., 0])


def _at_equal_proxy(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    one, two = _mean(a), _mean(b)
    # A proxy may fall again: a level counts as reached the first time.
    reached = [np.maximum.accumulate(m[..., 1], 1) for m in (one, two)]
    level = np.minimum(reached[0][:, -1], reached[1][:, -1])
    return _when(reached[0], level, one[..., 0]) - _when(reached[1], level, two[..., 0])


def _when(rising: np.ndarray, level: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` ``(R, P)``, interpolated to where ``rising`` ``(R, P)`` first reaches a level."""
    rows = np.arange(len(level))
    after = (rising >= level[:, None]).argmax(1)
    before = np.maximum(after - 1, 0)
    low, high = rising[rows, before], rising[rows, after]
    span = high - low
    share = np.where(span > 0, (level - low) / np.where(span > 0, span, 1.0), 1.0)
    return np.asarray(values[rows, before] * (1 - share) + values[rows, after] * share)


def _least_gain(units: np.ndarray) -> Statistic:
    """``units`` ``(Q,)``: what one deviation of each part is; a part without spread counts raw."""
    scale = np.where(units > 0, units, 1.0)

    def statistic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        gains = [((m[:, -1] - m[:, 0]) / scale).min(1) for m in (_mean(a), _mean(b))]
        return np.asarray(gains[0] - gains[1])

    return statistic
