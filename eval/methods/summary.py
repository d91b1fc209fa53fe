"""The numbers of a comparison that its page and its tables show, computed once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter

import numpy as np

from eval.methods.claims import At, Claim, Decided, Word, decide, gain, lacks, read_claims, verdict
from eval.methods.read import Comparison, MethodRuns
from eval.methods.spreads import at_end, known_variances
from eval.run_statistics import end_improvement, end_iqm
from eval.statistics import Interval

SHARE = (0.0, 1.0)
FREE = (-math.inf, math.inf)


@dataclass(frozen=True)
class Line:
    """One method in numbers.

    Attributes:
        lacks: why there is no verdict on it yet.
        proxies: start and end of each trained measure, and of further ones.
        ahead: of steering, its accuracy minus that of the row beside it, at equal ``nfe`` and
            in equal ``seconds``.
        overhead: of steering, its own seconds over those of network, decoder and reward.
    """

    runs: MethodRuns
    accuracy: Interval
    iqm: Interval
    gain: Interval
    improvement: Interval | None
    proxies: tuple[tuple[str, float, float], ...]
    ahead: Mapping[str, Interval] = field(default_factory=dict)
    overhead: float | None = None
    lacks: str = ""

    @property
    def word(self) -> Word:
        """Whether it gains over the base: the claim that every method makes."""
        return "undecided" if self.lacks else verdict(self.gain)


@dataclass
class Summary:
    """A comparison with its lines and decided claims."""

    comparison: Comparison
    _curves: dict[tuple[str, str], list[Interval]] = field(default_factory=dict)

    @property
    def reference(self) -> str | None:
        """The method that the others are drawn beside, if a run of it is finished."""
        name = str(self.comparison.table["reference"])
        return name if name in self.comparison.methods else None

    def beside(self, name: str) -> str | None:
        """The row that another is compared with: its own choice or the reference."""
        chosen = self.comparison.methods[name].row.get("beside") or self.reference
        return chosen if chosen in self.comparison.methods and chosen != name else None

    @cached_property
    def lines(self) -> list[Line]:
        """One for each method with a finished run: the best first, controls after the methods."""
        found = [self._line(m) for m in self.comparison.methods.values()]
        return sorted(found, key=lambda ln: (ln.runs.control, -ln.accuracy.mean))

    @cached_property
    def decided(self) -> list[Decided]:
        """Every claim of the table."""
        return [decide(self.comparison, c) for c in read_claims(self.comparison.table["claims"])]

    def curve(self, name: str, measure: str = "accuracy") -> tuple[np.ndarray, list[Interval]]:
        """A measure with its interval at every point of the method's grid."""
        if (name, measure) not in self._curves:
            self._curves[name, measure] = self._curve(name, measure)
        return self.comparison.grid_of(name), self._curves[name, measure]

    def _curve(self, name: str, measure: str) -> list[Interval]:
        values = self.comparison.values(name, (measure,))
        bounds, interval = SHARE if measure == "accuracy" else FREE, self.comparison.interval
        found = []
        for p in range(values.shape[1]):
            known = known_variances(self.comparison, itemgetter((..., p)), [(name, 1.0)], measure)
            point = [values[:, p : p + 1]]
            found.append(interval(_at_point, point, samples=400, bounds=bounds, known=known))
        return found

    def _line(self, runs: MethodRuns) -> Line:
        c, name = self.comparison, runs.name
        values = c.values(name)
        beside = None
        if self.reference not in (None, name) and not c.steering:
            both = [values, c.values(str(self.reference))]
            beside = c.interval(end_improvement(), both, bounds=SHARE)
        return Line(
            runs=runs,
            accuracy=c.interval(
                _at_point,
                [values[:, -1:]],
                bounds=SHARE,
                known=known_variances(c, at_end, [(name, 1.0)]),
            ),
            iqm=c.interval(end_iqm(), [values], bounds=SHARE),
            gain=gain(c, name),
            improvement=beside,
            proxies=tuple((m, *self._ends(name, m)) for m in runs.row["proxies"]),
            ahead=self._ahead(name) if c.steering else {},
            overhead=_overhead(runs),
            lacks=lacks(c, name),
        )

    def _ahead(self, name: str) -> dict[str, Interval]:
        """Where it has a row beside it and budgets of its own, how far it is ahead of that."""
        other, found = self.beside(name), {}
        if other is None or self.comparison.methods[name].points < 2:
            return {}
        equal: dict[str, At] = {"nfe": "equal_nfe", "seconds": "equal_time"}
        for unit, at in equal.items():
            claim = Claim(says=name, better=name, than=other, at=at)
            interval = decide(self.comparison, claim).interval
            if interval is not None:
                found[unit] = interval
        return found

    def _ends(self, name: str, measure: str) -> tuple[float, float]:
        cells = self.comparison.pictures.cells(self.comparison.values(name, (measure,)))
        means = cells.mean((0, 1, 2))[:, 0]
        return float(means[0]), float(means[-1])


def _overhead(runs: MethodRuns) -> float | None:
    """Seconds of steering that went into nothing a plain sampler or a reward would take."""
    costs = [cost for run in runs.runs for cost in run.costs if cost["reward_calls"]]
    working = sum(cost["working"] for cost in costs)
    return sum(cost["seconds"] for cost in costs) / working - 1 if working else None


def _at_point(cells: np.ndarray) -> np.ndarray:
    return np.asarray(cells.mean((1, 2))[:, 0, 0])
