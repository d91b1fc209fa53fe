"""Reads the folder of a comparison: the runs of each method as arrays over the same pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.methods.judges import measured
from eval.result import EvalResult
from eval.run_statistics import Pictures, Statistic, interval_of, interval_over_prompts
from eval.statistics import Interval
from mmalign.runtime.log import read_jsonl

FILE = "comparison.json"
TIMING = "timing.json"  # seconds of a row that was run alone
ENDED = ("finished", "diverged")  # states of runs that have an outcome


@dataclass(frozen=True)
class RunCurve:
    """Evaluations of a run that has ended: ``nfe``, ``seconds`` and ``steps`` spent before each.

    Of training, they are those of the whole run; of steering, those for one prompt, and ``costs``
    says more about each point. ``diverged`` is why training broke down, empty where it did not;
    such a run keeps its last evaluation to the end of the budget.
    """

    seed: int
    updates: int
    nfe: np.ndarray
    seconds: np.ndarray
    results: tuple[EvalResult, ...]
    costs: tuple[Mapping[str, Any], ...] = ()
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    diverged: str = ""


@dataclass(frozen=True)
class MethodRuns:
    """One method: its row of the table, and its finished runs."""

    name: str
    row: Mapping[str, Any]
    runs: tuple[RunCurve, ...]

    @property
    def title(self) -> str:
        """What to call it."""
        return str(self.row["title"])

    @property
    def control(self) -> bool:
        """Whether it is the other side of a claim, and no method of a paper."""
        return bool(self.row.get("control"))

    @property
    def points(self) -> int:
        """Evaluations of a run."""
        return len(self.runs[0].results)

    def mean(self, name: str) -> float:
        """Mean over seeds of ``updates``, or of the final ``nfe``, ``seconds`` or another cost."""
        if name in ("updates", "nfe", "seconds", "steps"):
            return float(np.mean([np.atleast_1d(getattr(r, name))[-1] for r in self.runs]))
        return float(np.mean([r.costs[-1][name] for r in self.runs]))


@dataclass
class Comparison:
    """Everything a comparison has produced so far.

    Attributes:
        table: what was to be compared, with the state of every run.
        methods: those with a finished run, in the order of the table.
    """

    folder: Path
    table: Mapping[str, Any]
    methods: dict[str, MethodRuns]
    _kept: dict[tuple[str, int, str], np.ndarray] = field(default_factory=dict)
    _means: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    @property
    def grid(self) -> np.ndarray:
        """The points that curves of training are read at: equal parts of the budget, ``(P,)``."""
        points = int(self.table["points"])
        return np.linspace(0, float(self.table["nfe"]), points + 1)

    @property
    def steering(self) -> bool:
        """Whether methods of steering are compared, each at budgets of its own."""
        return self.table.get("kind") == "steering"

    def grid_of(self, name: str) -> np.ndarray:
        """The points that a method's curve is read at, ``(P,)``."""
        if not self.steering:
            return self.grid
        return np.asarray(np.mean([r.nfe for r in self.methods[name].runs], 0))

    def reached(self, names: Sequence[str], unit: str) -> float:
        """The most evaluations (``nfe``), ``seconds`` or ``steps`` that all of these have spent."""
        return min(self.methods[name].mean(unit) for name in names)

    def interval(
        self, statistic: Statistic, runs: Sequence[np.ndarray], *,
        known: Sequence[tuple[float, float]] = (), **options: Any,
    ) -> Interval:  # fmt: skip
        """A statistic of methods' values, with its interval.

        Over seeds and prompts of training; of steering over prompts, as its seeds are only noise.

        Args:
            known: what is known of the seeds of training, see :mod:`eval.methods.spreads`.
        """
        if self.steering:
            return interval_over_prompts(statistic, runs, self.pictures, **options)
        return interval_of(statistic, runs, self.pictures, known=known, **options)

    @property
    def unfinished(self) -> list[Mapping[str, Any]]:
        """Runs that are missing, were cut short or failed."""
        return [r for r in self.table["runs"] if r["state"] not in ENDED]

    @property
    def diverged(self) -> list[str]:
        """Runs in which training broke down, each with the reason."""
        every = ((m, run) for m in self.methods.values() for run in m.runs)
        return [f"{m.name}, seed {r.seed}: {r.diverged}" for m, r in every if r.diverged]

    @cached_property
    def pictures(self) -> Pictures:
        """Tasks and prompts of the pictures that every run was judged on.

        Raises:
            ValueError: a run was judged on other pictures; names it.
        """
        first: dict[int, Sequence[Any]] = {}
        for method in self.methods.values():
            for run in method.runs:
                group = run.seed if self.steering else 0  # steering seeds are seeds of the noise
                for result in run.results:
                    asked = [(r.key, r.prompt, r.seed, r.task) for r in result.rows]
                    if asked != first.setdefault(group, asked):
                        raise ValueError(
                            f"{result.folder} was judged on other pictures than the rest; "
                            "remove it and run the comparison again"
                        )
        rows: Sequence[Any] = next(iter(first.values()), ())
        return Pictures(tuple(a[3] for a in rows), tuple(a[1] for a in rows))

    def values(
        self, name: str, measures: Sequence[str] = ("accuracy",), grid: np.ndarray | None = None,
        unit: str = "nfe",
    ) -> np.ndarray:  # fmt: skip
        """``(S, P, K, Q)``: each picture's measures at the points of ``grid``.

        Between two evaluations a picture's value is interpolated in ``unit``, network evaluations,
        ``seconds`` or ``steps``; a run that ended a little off the budget keeps its end.

        Args:
            grid: ``(P,)``; by default that of :meth:`grid_of`.
        """
        grid = self.grid_of(name) if grid is None else grid
        runs = self.methods[name].runs
        return np.stack(
            [
                np.stack([_resampled(grid, getattr(r, unit), self._own(name, r, m)) for r in runs])
                for m in measures
            ],
            -1,
        )

    def means(self, name: str, measure: str) -> np.ndarray:
        """``(S, P)``: the mean over tasks of each run at the points of :meth:`grid_of`."""
        if (name, measure) not in self._means:
            cells = self.pictures.cells(self.values(name, (measure,)))
            self._means[name, measure] = cells[0, ..., 0].mean(1)
        return self._means[name, measure]

    def _own(self, name: str, run: RunCurve, measure: str) -> np.ndarray:
        """``(E, K)``: of the evaluations of one run."""
        key = (name, run.seed, measure)
        if key not in self._kept:
            self._kept[key] = np.stack([measured(r, measure) for r in run.results])
        return self._kept[key]

    def seconds(self, name: str) -> np.ndarray:
        """Mean time at the points of :meth:`grid_of`, ``(P,)``."""
        grid = self.grid_of(name)
        found = [np.interp(grid, r.nfe, r.seconds) for r in self.methods[name].runs]
        return np.asarray(np.mean(found, 0))


def read_comparison(folder: Path | str) -> Comparison:
    """Read ``comparison.json`` and every run that has ended.

    Raises:
        FileNotFoundError: no comparison there, or no run of it is finished.
    """
    folder = Path(folder)
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no comparison ({FILE}); run mmalign bench first")
    table = json.loads(path.read_text(encoding="utf-8"))
    methods = {}
    for name, row in table["methods"].items():
        done = [r for r in table["runs"] if r["method"] == name and r["state"] in ENDED]
        if done:
            runs = tuple(_read_run(folder / r["folder"], r["seed"]) for r in done)
            methods[name] = MethodRuns(name, row, runs)
    if not methods:
        raise FileNotFoundError(f"no run of the comparison in {folder} is finished yet")
    return Comparison(folder, table, methods)


def _read_run(folder: Path, seed: int) -> RunCurve:
    ended = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if "points" in ended:
        return _read_points(folder, seed, ended["points"])
    log = {int(r["step"]): r for r in read_jsonl(folder / "metrics.jsonl")}
    steps = [int(p.name.removeprefix("step_")) for p in sorted((folder / "eval").glob("step_*"))]
    known = [s for s in steps if s in log and s < ended["steps"]]
    reason = str(ended.get("diverged", ""))
    last = "diverged" if reason else "after"
    spots = ["before", *(f"step_{s:06d}" for s in known), last]
    points = [{"nfe": 0, "seconds": 0}, *(log[s] for s in known), ended]
    made = [0, *known, ended["steps"]]
    if reason and not (folder / "eval" / last / "result.json").is_file():
        # What it had become could not be evaluated: the evaluation before that is its last.
        spots, points, made = spots[:-1], points[:-1], made[:-1]
    results = [EvalResult.load(folder / "eval" / spot / "result.json") for spot in spots]
    nfe, seconds = (np.array([p[unit] for p in points], float) for unit in ("nfe", "seconds"))
    return RunCurve(seed, int(ended["steps"]), nfe, seconds, tuple(results),
                    steps=np.array(made, float), diverged=reason)  # fmt: skip


def _read_points(folder: Path, seed: int, points: Sequence[Mapping[str, Any]]) -> RunCurve:
    """A run that names its evaluations and what each of them cost; seconds are those taken alone,
    where there are any."""
    alone = _timed(folder.parent)
    points = [{**p, **alone.get(p["spot"], {})} for p in points]
    results = [EvalResult.load(folder / "eval" / p["spot"] / "result.json") for p in points]
    nfe, seconds = (np.array([p[unit] for p in points], float) for unit in ("nfe", "seconds"))
    return RunCurve(seed, 0, nfe, seconds, tuple(results), tuple(points))


def _timed(row: Path) -> dict[str, dict[str, float]]:
    """What a prompt took at each spot when the row was timed alone; empty where it was not."""
    file = row / TIMING
    if not file.is_file():
        return {}
    points = json.loads(file.read_text(encoding="utf-8"))["points"]
    return {p["spot"]: {unit: p[unit] for unit in ("seconds", "working")} for p in points}


def _resampled(grid: np.ndarray, nfe: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Rows of ``(E, K)`` values, known at ``nfe``, at the points of the grid: ``(P, K)``."""
    weights = np.stack([np.interp(grid, nfe, one) for one in np.eye(len(nfe))], 1)
    return np.asarray(weights @ values)
