"""Runs the comparison: every (method, seed) is a training run in a process and a folder of its own.

Finished runs are not repeated, a killed one is resumed by the training entry itself, a failed one
is named with its error and leaves the others alone. One in which training broke down has an outcome
too, or methods would be judged by the runs that survived: it is not repeated and is kept as
*diverged*.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmalign.config import ConfigError, from_dict, load_yaml
from mmalign.runtime.files import atomic_directory
from mmalign.runtime.log import say
from mmalign.runtime.workers import listed, run_missing, start_python
from trainers.comparison.prepare import PREPARED, prepare
from trainers.comparison.table import Table
from trainers.config import TrainConfig
from trainers.entry import resolve_recipe, run_hash
from trainers.objective import build_objective, process_of

FILE = "comparison.json"
OUT = Path("runs/methods")
ENDED = ("finished", "diverged")  # states of runs that have an outcome


@dataclass(frozen=True, eq=False)
class Run:
    """One run of the plan, with the configuration that it stands for."""

    method: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    config: TrainConfig

    @property
    def name(self) -> str:
        """Such as ``flow_grpo, seed 0``."""
        return f"{self.method}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Relative to the comparison's folder."""
        return f"{self.method}/seed_{self.seed}"


def plan(table: Table, out: Path = OUT) -> list[Run]:
    """All runs, seed by seed so that a comparison cut short holds every method.

    Args:
        out: where the comparison is kept; rows that train on prepared data name it.

    Raises:
        ConfigError, AssetError: a row that could not be trained, named.
    """
    return [_run(table, name, seed, out) for seed in table.seeds for name in table.methods]


def _run(table: Table, name: str, seed: int, out: Path) -> Run:
    method = table.methods[name]
    made = (out / PREPARED).as_posix()
    own = tuple(o.replace("{out}", made) for o in method.overrides)
    chosen = (*table.overrides, *own, *table.last, f"seed={seed}")
    budget = (f"max_nfe={table.nfe}", f"evaluation.every_nfe={-(-table.nfe // table.points)}")
    try:
        config = resolve_recipe(method.recipe, (*chosen, *budget))
        least = _least(config)
    except ValueError as error:
        raise ConfigError(f"method {name}: {error}") from error
    # More steps than the budget can pay for.
    steps = math.ceil(table.nfe / (config.batch * least)) + 1
    overrides = (*chosen, *budget, f"steps={steps}")
    return Run(name, seed, method.recipe, overrides, replace(config, steps=steps))


def _least(config: TrainConfig) -> int:
    """Evaluations that a step costs at least for each picture.

    Its rollout; where pictures are there already, a pass over each of their draws; and where the
    reward's gradient is followed, whose chains may end early, one.
    """
    if process_of(_objective(config)) == "gradient":
        return 1
    return config.rollout.steps if config.pairs is None else config.forward.draws


def _objective(config: TrainConfig) -> Any:
    return build_objective(config.algorithm, dict(config.objective))


def state_of(run: Run, out: Path) -> str:
    """``missing``, ``started``, ``finished`` or ``diverged``.

    Raises:
        ConfigError: the folder holds a run with other settings.
    """
    folder = out / run.folder
    if not (folder / "config.yaml").is_file():
        return "missing"
    held = from_dict(TrainConfig, load_yaml(folder / "config.yaml"))
    same = (run_hash(held), held.max_nfe, held.evaluation)
    if same != (run_hash(run.config), run.config.max_nfe, run.config.evaluation):
        raise ConfigError(
            f"{folder} holds a run with other settings than {run.name} now has; choose another "
            "--out, or remove that folder"
        )
    ended = _json(folder / "run.json")
    if ended.get("diverged"):
        return "diverged"
    done = ended.get("finished") is True
    return "finished" if done and (folder / "eval/after/result.json").is_file() else "started"


def run_all(table: Table, out: Path, jobs: int = 1, threads: int = 1) -> dict[str, Any]:
    """Run what is missing, ``jobs`` processes of ``threads`` threads side by side.

    ``jobs=0`` runs nothing. Returns, and keeps in ``comparison.json``, the table and the state of
    every run: ``finished``, ``diverged`` or ``failed`` with the reason, ``started`` or ``missing``.

    Raises:
        ConfigError: before anything is run, where a row is unusable or ``out`` holds other runs.
    """
    runs = plan(table, out)
    states = {run.folder: state_of(run, out) for run in runs}
    errors: dict[str, str] = {}
    if jobs:
        _prepare(table, runs, out, threads, states, errors)

    def start(run: Run) -> subprocess.Popen[bytes]:
        _lend_base(run, runs, out)
        return _start(run, out / run.folder, threads)

    def record() -> dict[str, Any]:
        return _record(table, runs, states, {**errors, **_reasons(runs, states, out)}, threads)

    def judged(run: Run) -> str:
        return "diverged" if state_of(run, out) == "diverged" else "failed"

    return run_missing(
        runs,
        out / FILE,
        jobs,
        states=states,
        errors=errors,
        start=start,
        record=record,
        judged=judged,
    )


def _prepare(
    table: Table, runs: Sequence[Run], out: Path, threads: int, states: dict[str, str],
    errors: dict[str, str],
) -> None:  # fmt: skip
    """Make the data that unfinished runs train on; where that fails, so have they."""
    for name in table.prepare:
        needy = [r.folder for r in runs if name in table.needs(r.method)]
        waiting = [folder for folder in needy if states[folder] in ("missing", "started")]
        try:
            if waiting:
                prepare(name, table.prepare[name], out, threads)
        except ConfigError as error:
            say(str(error))
            states.update(dict.fromkeys(waiting, "failed"))
            errors.update(dict.fromkeys(waiting, str(error)))


def _reasons(runs: Sequence[Run], states: Mapping[str, str], out: Path) -> dict[str, str]:
    """Why runs broke down, by folder."""
    gone = [run.folder for run in runs if states[run.folder] == "diverged"]
    return {folder: str(_json(out / folder / "run.json")["diverged"]) for folder in gone}


def _record(
    table: Table,
    runs: Sequence[Run],
    states: Mapping[str, str],
    errors: Mapping[str, str],
    threads: int,
) -> dict[str, Any]:
    own = {**asdict(table), "runs": listed(runs, states, errors)}
    return {"format": 1, "threads": threads, **own}


def _start(run: Run, folder: Path, threads: int) -> subprocess.Popen[bytes]:
    arguments = ["-m", "mmalign", "train", run.recipe, *run.overrides]
    arguments += ["--output-dir", str(folder), "--no-preflight", "--no-report"]
    return start_python(arguments, folder, threads)


def _lend_base(run: Run, runs: Sequence[Run], out: Path) -> None:
    """Copy the evaluation before training of a run that starts from the same model.

    Pictures, seeds and weights are the same, so they need not be made for each run; the copy is
    checked, picture by picture, by the run that gets it. An adapter makes a model of its own.
    """
    target = out / run.folder / "eval" / "before"
    if run.config.model.adapter != "full" or target.exists():
        return
    for other in runs:
        source = out / other.folder / "eval" / "before"
        # A run out of records has verdicts alone.
        whole = all((source / name).is_file() for name in ("result.json", "samples.jsonl"))
        if whole and _base(other) == _base(run):
            with atomic_directory(target) as partial:
                shutil.copytree(source, partial, dirs_exist_ok=True)
            return


def _base(run: Run) -> tuple[Any, ...]:
    c = run.config
    how = (c.model.adapter, c.model.precision, c.model.attention, c.device)
    grid = (c.rollout.size, c.rollout.spacing)
    # Some few-step students are sampled by noising afresh, before training too.
    objective = _objective(c)
    student = objective.student(c)["renoise"] if hasattr(objective, "student") else None
    return (c.policy, *how, *grid, c.evaluation, student)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
