"""Runs the comparison: every (row, seed) in a process and a folder of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.steering.one import RECORD, Point, Spec, read_spec, write_spec
from eval.steering.table import TUNED, Row, Table
from eval.steering.timing import Timing, time_missing
from mmalign.config import ConfigError, from_dict
from mmalign.registry import REWARDS, unknown
from mmalign.runtime.files import make_directory
from mmalign.runtime.log import say
from mmalign.runtime.workers import listed, run_missing, start_python
from mmalign.steering import build_steerer

FILE = "comparison.json"


@dataclass(frozen=True, eq=False)
class Run:
    """One run of the plan; ``skip`` says why it cannot be."""

    method: str
    seed: int
    spec: Spec
    skip: str = ""

    @property
    def name(self) -> str:
        """Such as ``fk, seed 0``."""
        return f"{self.method}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Relative to the comparison's folder."""
        return f"{self.method}/seed_{self.seed}"


def plan(table: Table) -> list[Run]:
    """All runs, seed by seed so that a comparison cut short holds every method.

    Raises:
        UnknownNameError, ValueError: no such reward, or a method or option that does not exist.
    """
    cards = {entry.name: entry.info for entry in REWARDS}
    if table.reward not in cards:
        raise unknown("reward", table.reward, cards)
    slope = bool(cards[table.reward].differentiable)
    return [
        Run(name, seed, _spec(table, name, row, seed), _reason(table, row, slope))
        for seed in table.seeds
        for name, row in table.methods.items()
    ]


def _reason(table: Table, row: Row, slope: bool) -> str:
    if not table.models[row.model].policy:
        return f"give the {row.model} model: --{TUNED} FOLDER"
    if row.gradient and not slope:
        return f"{row.method} follows a gradient, and {table.reward} has none"
    return ""


def _spec(table: Table, name: str, row: Row, seed: int) -> Spec:
    model = table.models[row.model]
    fixed = {**row.options, **row.for_reward.get(table.reward, {})}
    points = [
        Point(nfe=nfe, options={**fixed, **{option: v[i] for option, v in row.sizes.items()}})
        for i, nfe in enumerate(table.budgets_of(row))
    ]
    for point in points:
        try:
            build_steerer(row.method, 0, point.options)
        except ValueError as error:
            raise ConfigError(f"method {name}: {error}") from error
    spec = Spec(
        policy=model.policy, lora=model.lora, steps=model.steps,
        guidance_scale=model.guidance_scale, method=row.method, points=tuple(points),
        reward=table.reward, prompts_per_task=table.prompts_per_task, seed=seed,
    )  # fmt: skip
    return from_dict(Spec, json.loads(json.dumps(asdict(spec))))  # as it is read again


def state_of(run: Run, out: Path) -> str:
    """``left out``, ``missing``, ``started`` or ``finished``.

    Raises:
        ConfigError: the folder holds a run with other settings.
    """
    folder = out / run.folder
    if run.skip:
        return "left out"
    if not (folder / "spec.json").is_file():
        return "missing"
    if read_spec(folder) != run.spec:
        raise ConfigError(
            f"{folder} holds a run with other settings than {run.name} now has; choose another "
            "--out, or remove that folder"
        )
    return "finished" if (folder / RECORD).is_file() else "started"


def run_all(table: Table, out: Path, jobs: int = 1, threads: int = 1) -> dict[str, Any]:
    """Run what is missing, ``jobs`` processes of ``threads`` threads side by side.

    ``jobs=0`` runs nothing. Returns, and keeps in ``comparison.json``, the table and the state of
    every run: ``finished``, ``failed`` with its error, ``started``, ``missing``, or ``left out``
    with the reason.

    Raises:
        ConfigError: before anything is run, where a row is unusable or ``out`` holds other runs.
    """
    runs = plan(table)
    states = {run.folder: state_of(run, out) for run in runs}
    errors = {run.folder: run.skip for run in runs if run.skip}

    def start(run: Run) -> subprocess.Popen[bytes]:
        folder = make_directory(out / run.folder)
        write_spec(run.spec, folder)
        return start_python(["-m", "eval.steering.one", str(folder)], folder, threads)

    def record() -> dict[str, Any]:
        own = {**asdict(table), "methods": _rows(table), "runs": listed(runs, states, errors)}
        return {"format": 1, "kind": "steering", "threads": threads, **own}

    found = run_missing(
        runs, out / FILE, jobs, states=states, errors=errors, start=start, record=record
    )
    if jobs:
        _time(runs, out, states, threads)
    return found


def _time(runs: Sequence[Run], out: Path, states: Mapping[str, str], threads: int) -> None:
    """Seconds of every row with a finished run, taken alone; failures only leave those of runs."""
    rows = {run.method: run for run in reversed(runs) if states[run.folder] == "finished"}
    errors: dict[str, str] = {}
    timings = [Timing(name, run.spec, run.folder) for name, run in rows.items()]
    time_missing(timings, out, threads, errors)
    for name, error in errors.items():
        say(f"{name} could not be timed alone, the seconds of its runs are shown: {error}")


def _rows(table: Table) -> Mapping[str, Any]:
    proxies = [table.reward, *table.judges]
    return {
        name: {**asdict(row), "beside": row.beside or table.reference, "proxies": proxies}
        for name, row in table.methods.items()
    }
