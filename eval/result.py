"""What an evaluation returns: one row for each picture, summaries with intervals, provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from eval.statistics import Interval, bootstrap_mean, bootstrap_task_mean
from mmalign.registry import unknown
from mmalign.runtime.files import atomic_write_bytes

FORMAT = 1  # of result.json


class ResultError(ValueError):
    """A ``result.json`` that cannot be read; the message names it, what is wrong and the fix."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture. ``value`` and ``partial`` are ``None`` where it could not be scored (or where
    the benchmark has no partial credit); ``image`` is a path relative to the result's folder;
    ``parts`` are kept where the benchmark's own numbers need them (``keeps_parts``)."""

    key: str
    prompt: str
    task: str
    sample: int
    seed: int
    value: float | None
    valid: bool
    note: str = ""
    partial: float | None = None
    image: str | None = None
    parts: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One task, or (overall) the mean of the task means.

    ``accuracy`` is over scored pictures only; ``accuracy_counting_unscored_as_wrong`` gives every
    unscored picture a zero, which is what a generator that broke down deserves.
    """

    accuracy: Interval
    accuracy_counting_unscored_as_wrong: Interval
    n: int
    unscored: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "accuracy": self.accuracy.to_json(),
            "accuracy_counting_unscored_as_wrong": (
                self.accuracy_counting_unscored_as_wrong.to_json()
            ),
            "n": self.n,
            "unscored": self.unscored,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Summary:
        """Inverse of :meth:`to_json`."""
        keys = ("accuracy", "accuracy_counting_unscored_as_wrong")
        intervals = {k: Interval.from_json(data[k]) for k in keys}
        return Summary(n=data["n"], unscored=data["unscored"], **intervals)


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One benchmark run.

    Attributes:
        benchmark, version: which benchmark.
        label: free text, such as ``before``.
        policy: name of the generator.
        settings: steps, guidance, size, seed rule, benchmark options, identities; what must agree
            for pictures to belong to one run.
        rows: one for each request, in the benchmark's order.
        tasks: summary of each task.
        overall: the mean of the task means.
        provenance: library versions, device, platform, identities, time.
        seconds: time spent on generating and judging these pictures.
        nfe: network evaluations spent on these pictures.
        numbers: what the benchmark's authors report, by name; ``None`` where it is undefined.
        unit: of the values: ``share`` in [0, 1], or ``score`` on a scale of the benchmark's own.
        available: pictures that the benchmark asks for without ``limit``; ``None`` is unknown.
        problems: what is odd with the pictures, in words.
        training: what the model was trained on that bears on this result; see :mod:`eval.trust`.
        folder: where ``images/`` lies; not part of the file.
    """

    benchmark: str
    version: str
    label: str
    policy: str
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    tasks: Mapping[str, Summary]
    overall: Summary
    provenance: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    nfe: float = 0.0
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    unit: str = "share"
    available: int | None = None
    problems: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)

    @property
    def accuracy(self) -> Interval:
        """Mean over tasks, over scored pictures."""
        return self.overall.accuracy

    @property
    def accuracy_counting_unscored_as_wrong(self) -> Interval:
        """Mean over tasks, every unscored picture a zero."""
        return self.overall.accuracy_counting_unscored_as_wrong

    @property
    def limited(self) -> bool:
        """Whether this is a part of the benchmark only."""
        return self.available is not None and len(self.rows) < self.available

    @property
    def images_per_second(self) -> float:
        """Pictures generated and judged each second; where that was what was measured, this."""
        measured = self.numbers.get("images/s")
        if measured is not None:
            return measured
        return len(self.rows) / self.seconds if self.seconds > 0 else 0.0

    def image_path(self, row: Row) -> Path | None:
        """The picture of ``row`` on disk, if it was kept and is there."""
        if self.folder is None or row.image is None:
            return None
        path = self.folder / row.image
        return path if path.is_file() else None

    def to_json(self) -> str:
        """One JSON document, readable by :meth:`from_json`; undefined numbers are ``null``."""
        data = {
            "format": FORMAT,
            **{k: getattr(self, k) for k in ("benchmark", "version", "label", "policy")},
            "settings": dict(self.settings),
            "overall": self.overall.to_json(),
            "tasks": {t: s.to_json() for t, s in self.tasks.items()},
            "provenance": dict(self.provenance),
            "seconds": self.seconds,
            "nfe": self.nfe,
            "numbers": dict(self.numbers),
            "images_per_second": self.images_per_second,
            "unit": self.unit,
            "available": self.available,
            "problems": list(self.problems),
            "training": dict(self.training),
            "rows": [asdict(r) for r in self.rows],
        }
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(text: str, folder: Path | None = None) -> EvalResult:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: not a result of this format.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"not an evaluation result of format {FORMAT}")
        data.pop("images_per_second", None)
        _known(data, EvalResult, "result")
        data["problems"] = tuple(data.get("problems", ()))
        data["rows"] = tuple(_row(r, n) for n, r in enumerate(data["rows"], 1))
        data["tasks"] = {t: Summary.from_json(s) for t, s in data["tasks"].items()}
        data["overall"] = Summary.from_json(data["overall"])
        return EvalResult(**data, folder=folder)

    def save(self, path: Path) -> None:
        """Write atomically."""
        atomic_write_bytes(path, self.to_json().encode())

    @staticmethod
    def load(path: Path) -> EvalResult:
        """Read ``result.json``; pictures are looked for beside it.

        Raises:
            ResultError: it is no whole result of this version; names the file and what is wrong.
        """
        try:
            return EvalResult.from_json(path.read_text(encoding="utf-8"), path.parent)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ResultError(
                f"{path}: {said.rstrip('.')}. It is damaged, edited, or of another version: run "
                "its evaluation again (finished pictures are kept), or move it away"
            ) from error


def _row(data: Mapping[str, Any], number: int) -> Row:
    _known(data, Row, f"row {number}")
    return Row(**data)


def _known(data: Mapping[str, Any], kind: Any, what: str) -> None:
    known = {f.name for f in fields(kind)}
    for name in data:
        if name not in known:
            raise unknown(f"column of {what}", name, known)


def summarise(rows: Sequence[Row]) -> tuple[dict[str, Summary], Summary]:
    """Summaries of each task (in order of appearance) and overall, intervals by prompt."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.task, []).append(row)
    scored = {t: _values([r for r in g if r.valid]) for t, g in groups.items()}
    strict = {t: _values(g) for t, g in groups.items()}
    unscored = {t: sum(not r.valid for r in g) for t, g in groups.items()}
    tasks = {
        t: Summary(
            accuracy=bootstrap_mean(*scored[t]),
            accuracy_counting_unscored_as_wrong=bootstrap_mean(*strict[t]),
            n=len(g),
            unscored=unscored[t],
        )
        for t, g in groups.items()
    }
    overall = Summary(
        accuracy=bootstrap_task_mean(scored),
        accuracy_counting_unscored_as_wrong=bootstrap_task_mean(strict),
        n=len(rows),
        unscored=sum(unscored.values()),
    )
    return tasks, overall


def _values(rows: Sequence[Row]) -> tuple[list[float], list[str]]:
    return [r.value if r.valid and r.value is not None else 0.0 for r in rows], [
        r.prompt for r in rows
    ]


def finite(value: float) -> float | None:
    """``value``, or ``None`` where it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None
