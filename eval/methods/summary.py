"""The numbers of a comparison that its page and its tables show, computed once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from eval.methods.claims import Decided, Word, decide, gain, read_claims, verdict
from eval.methods.read import Comparison, MethodRuns
from eval.run_statistics import end_improvement, end_iqm, interval_of
from eval.statistics import Interval

SHARE = (0.0, 1.0)


@dataclass(frozen=True)
class Line:
    """One method in numbers; ``proxies`` are start and end of each trained measure."""

    runs: MethodRuns
    accuracy: Interval
    iqm: Interval
    gain: Interval
    improvement: Interval | None
    proxies: tuple[tuple[str, float, float], ...]

    @property
    def word(self) -> Word:
        """Whether it gains over the base: the claim that every method makes."""
        return verdict(self.gain)


@dataclass
class Summary:
    """A comparison with its lines and decided claims."""

    comparison: Comparison
    _curves: dict[str, list[Interval]] = field(default_factory=dict)

    @property
    def reference(self) -> str | None:
        """The method that the others are drawn beside, if a run of it is finished."""
        name = str(self.comparison.table["reference"])
        return name if name in self.comparison.methods else None

    @cached_property
    def lines(self) -> list[Line]:
        """One for each method with a finished run: the best first, controls after the methods."""
        found = [self._line(m) for m in self.comparison.methods.values()]
        return sorted(found, key=lambda ln: (ln.runs.control, -ln.accuracy.mean))

    @cached_property
    def decided(self) -> list[Decided]:
        """Every claim of the table."""
        return [decide(self.comparison, c) for c in read_claims(self.comparison.table["claims"])]

    def curve(self, name: str) -> tuple[np.ndarray, list[Interval]]:
        """Accuracy with its interval at every point of the grid."""
        if name not in self._curves:
            self._curves[name] = self._curve(name)
        return self.comparison.grid, self._curves[name]

    def _curve(self, name: str) -> list[Interval]:
        values = self.comparison.values(name)
        pictures = self.comparison.pictures
        return [
            interval_of(_at_point, [values[:, p : p + 1]], pictures, samples=400, bounds=SHARE)
            for p in range(values.shape[1])
        ]

    def _line(self, runs: MethodRuns) -> Line:
        c, name = self.comparison, runs.name
        values = c.values(name)
        beside = None
        if self.reference not in (None, name):
            both = [values, c.values(str(self.reference))]
            beside = interval_of(end_improvement(), both, c.pictures, bounds=SHARE)
        return Line(
            runs=runs,
            accuracy=interval_of(_at_point, [values[:, -1:]], c.pictures, bounds=SHARE),
            iqm=interval_of(end_iqm(), [values], c.pictures, bounds=SHARE),
            gain=gain(c, name),
            improvement=beside,
            proxies=tuple((m, *self._ends(name, m)) for m in runs.row["proxies"]),
        )

    def _ends(self, name: str, measure: str) -> tuple[float, float]:
        cells = self.comparison.pictures.cells(self.comparison.values(name, (measure,)))
        means = cells.mean((0, 1, 2))[:, 0]
        return float(means[0]), float(means[-1])


def _at_point(cells: np.ndarray) -> np.ndarray:
    return np.asarray(cells.mean((1, 2))[:, 0, 0])
