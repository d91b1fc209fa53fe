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
from eval.run_statistics import Pictures
from mmalign.runtime.log import read_jsonl

FILE = "comparison.json"


@dataclass(frozen=True)
class RunCurve:
    """The evaluations of one finished run: ``nfe`` and ``seconds`` of training before each."""

    seed: int
    updates: int
    nfe: np.ndarray
    seconds: np.ndarray
    results: tuple[EvalResult, ...]


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

    def mean(self, name: str) -> float:
        """Mean over seeds of ``updates``, or of the final ``nfe`` or ``seconds``."""
        found = [np.atleast_1d(getattr(r, name))[-1] for r in self.runs]
        return float(np.mean(found))


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
    _kept: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    @property
    def grid(self) -> np.ndarray:
        """The points that curves are read at: equal parts of the budget, ``(P,)``."""
        points = int(self.table["points"])
        return np.linspace(0, float(self.table["nfe"]), points + 1)

    @property
    def unfinished(self) -> list[Mapping[str, Any]]:
        """Runs that are missing, were cut short or failed."""
        return [r for r in self.table["runs"] if r["state"] != "finished"]

    @cached_property
    def pictures(self) -> Pictures:
        """Tasks and prompts of the pictures that every run was judged on.

        Raises:
            ValueError: a run was judged on other pictures; names it.
        """
        first: Sequence[Any] = ()
        for method in self.methods.values():
            for run in method.runs:
                for result in run.results:
                    asked = [(r.key, r.prompt, r.seed, r.task) for r in result.rows]
                    first = first or asked
                    if asked != first:
                        raise ValueError(
                            f"{result.folder} was judged on other pictures than the rest; "
                            "remove it and run the comparison again"
                        )
        return Pictures(tuple(a[3] for a in first), tuple(a[1] for a in first))

    def values(self, name: str, measures: Sequence[str] = ("accuracy",)) -> np.ndarray:
        """``(S, P, K, Q)``: each picture's measures at the points of :attr:`grid`.

        Between two evaluations a picture's value is interpolated in network evaluations; a run
        that ended a little off the budget keeps its end.
        """
        return np.stack([self._measure(name, m) for m in measures], -1)

    def _measure(self, name: str, measure: str) -> np.ndarray:
        if (name, measure) not in self._kept:
            found = [self._run(run, measure) for run in self.methods[name].runs]
            self._kept[name, measure] = np.stack(found)
        return self._kept[name, measure]

    def _run(self, run: RunCurve, measure: str) -> np.ndarray:
        own = np.stack([measured(r, measure) for r in run.results])
        return _resampled(self.grid, run.nfe, own)

    def seconds(self, name: str) -> np.ndarray:
        """Mean training time at the points of :attr:`grid`, ``(P,)``."""
        found = [np.interp(self.grid, r.nfe, r.seconds) for r in self.methods[name].runs]
        return np.asarray(np.mean(found, 0))


def read_comparison(folder: Path | str) -> Comparison:
    """Read ``comparison.json`` and every finished run.

    Raises:
        FileNotFoundError: no comparison there, or no run of it is finished.
    """
    folder = Path(folder)
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no comparison ({FILE}); run bench methods first")
    table = json.loads(path.read_text(encoding="utf-8"))
    methods = {}
    for name, row in table["methods"].items():
        done = [r for r in table["runs"] if r["method"] == name and r["state"] == "finished"]
        if done:
            runs = tuple(_read_run(folder / r["folder"], r["seed"]) for r in done)
            methods[name] = MethodRuns(name, row, runs)
    if not methods:
        raise FileNotFoundError(f"no run of the comparison in {folder} is finished yet")
    return Comparison(folder, table, methods)


def _read_run(folder: Path, seed: int) -> RunCurve:
    ended = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    log = {int(r["step"]): r for r in read_jsonl(folder / "metrics.jsonl")}
    steps = [int(p.name.removeprefix("step_")) for p in sorted((folder / "eval").glob("step_*"))]
    known = [s for s in steps if s in log and s < ended["steps"]]
    spots = ["before", *(f"step_{s:06d}" for s in known), "after"]
    nfe = [0.0, *(log[s]["nfe"] for s in known), ended["nfe"]]
    seconds = [0.0, *(log[s]["seconds"] for s in known), ended["seconds"]]
    results = [EvalResult.load(folder / "eval" / spot / "result.json") for spot in spots]
    return RunCurve(seed, int(ended["steps"]), np.array(nfe, float), np.array(seconds, float),
                    tuple(results))  # fmt: skip


def _resampled(grid: np.ndarray, nfe: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Rows of ``(E, K)`` values, known at ``nfe``, at the points of the grid: ``(P, K)``."""
    weights = np.stack([np.interp(grid, nfe, one) for one in np.eye(len(nfe))], 1)
    return np.asarray(weights @ values)
