"""What a comparison of rewards returns: numbers with intervals for each, in one ranked table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.result import finite
from eval.statistics import Interval
from mmalign.runtime.files import atomic_write_bytes

FORMAT = 1  # of result.json


@dataclass(frozen=True, kw_only=True)
class RewardRow:
    """One reward's numbers.

    Attributes:
        label: what the user wrote.
        identity: of the model: weights, version, settings.
        measures: the benchmark's numbers by name, the headline first.
        categories, dimensions: the headline's kind of number for parts of the benchmark.
        items, unscored: how many there are, and how many of them have no score.
        reasons: why, with how many items.
        p_value: that it is as good as the first of the table (paired permutation test on items
            that both scored); ``None`` for the first, and where the headline is no mean of points.
        shared: pairs of points of that test.
        seconds: spent on asking; 0 where all answers were there.
    """

    label: str
    identity: str
    measures: Mapping[str, Interval]
    categories: Mapping[str, Interval]
    dimensions: Mapping[str, Interval]
    items: int
    unscored: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    p_value: float | None = None
    shared: int = 0
    seconds: float = 0.0

    @property
    def headline(self) -> Interval:
        """The number that ranks."""
        return next(iter(self.measures.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        data = dict(vars(self))
        for name in ("measures", "categories", "dimensions"):
            data[name] = {k: v.to_json() for k, v in data[name].items()}
        data["reasons"] = dict(self.reasons)
        data["p_value"] = None if self.p_value is None else finite(self.p_value)
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> RewardRow:
        """Inverse of :meth:`to_json`."""
        parts = {
            name: {k: Interval.from_json(v) for k, v in data[name].items()}
            for name in ("measures", "categories", "dimensions")
        }
        return RewardRow(**{**data, **parts})


@dataclass(frozen=True, kw_only=True)
class RewardReport:
    """Several rewards on one benchmark, best first.

    Attributes:
        benchmark, version, mode: what was run.
        meanings: of each measure, one line; ``chance`` its value for a guess; ``shares`` those
            that are printed in per cent.
        problems: rows of the data that could not be used.
        provenance: options, digest of the data, versions, platform, time.
        folder: where it was written; not part of the file.
    """

    benchmark: str
    version: str
    mode: str
    meanings: Mapping[str, str]
    chance: Mapping[str, float | None]
    shares: Sequence[str]
    rows: Sequence[RewardRow]
    problems: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)

    @property
    def headline(self) -> str:
        """Name of the measure that ranks."""
        return next(iter(self.meanings))

    def __getitem__(self, label: str) -> RewardRow:
        return next(row for row in self.rows if row.label == label)

    def to_json(self) -> str:
        """One JSON document; undefined numbers are ``null``."""
        data = {k: v for k, v in vars(self).items() if k not in ("folder", "rows")}
        data = {"format": FORMAT, **data, "rows": [row.to_json() for row in self.rows]}
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False, default=list)

    @staticmethod
    def from_json(text: str, folder: Path | None = None) -> RewardReport:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: not a report of this format.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"not a comparison of rewards of format {FORMAT}")
        data["rows"] = tuple(RewardRow.from_json(row) for row in data["rows"])
        return RewardReport(**data, folder=folder)

    def save(self, path: Path) -> None:
        """Write atomically."""
        atomic_write_bytes(path, self.to_json().encode())

    @staticmethod
    def load(path: Path) -> RewardReport:
        """Read ``result.json``."""
        return RewardReport.from_json(path.read_text(encoding="utf-8"), path.parent)
