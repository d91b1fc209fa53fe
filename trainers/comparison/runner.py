"""Runs the comparison: every (method, seed) is a training run in a process and a folder of its own.

Finished runs are not repeated, a killed one is resumed by the training entry itself, a failed one
is named with its error and leaves the others alone.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmalign.config import ConfigError, from_dict, load_yaml
from mmalign.runtime.files import atomic_directory, atomic_write_json, make_directory
from mmalign.runtime.log import say
from trainers.comparison.table import Table
from trainers.config import TrainConfig
from trainers.entry import resolve_recipe, run_hash

FILE = "comparison.json"
POLL_SECONDS = 0.2
_ROOT = Path(__file__).resolve().parents[2]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


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


def plan(table: Table) -> list[Run]:
    """All runs, seed by seed so that a comparison cut short holds every method.

    Raises:
        ConfigError, AssetError: a row that could not be trained, named.
    """
    return [_run(table, name, seed) for seed in table.seeds for name in table.methods]


def _run(table: Table, name: str, seed: int) -> Run:
    method = table.methods[name]
    chosen = (*table.overrides, *method.overrides, *table.last, f"seed={seed}")
    budget = (f"max_nfe={table.nfe}", f"evaluation.every_nfe={-(-table.nfe // table.points)}")
    try:
        config = resolve_recipe(method.recipe, (*chosen, *budget))
    except ValueError as error:
        raise ConfigError(f"method {name}: {error}") from error
    # A step costs at least its rollout, so these are more steps than the budget can pay for.
    steps = math.ceil(table.nfe / (config.batch * config.rollout.steps)) + 1
    overrides = (*chosen, *budget, f"steps={steps}")
    return Run(name, seed, method.recipe, overrides, replace(config, steps=steps))


def state_of(run: Run, out: Path) -> str:
    """``missing``, ``started`` or ``finished``.

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
    done = _json(folder / "run.json").get("finished") is True
    return "finished" if done and (folder / "eval/after/result.json").is_file() else "started"


def run_all(table: Table, out: Path, jobs: int = 1, threads: int = 1) -> dict[str, Any]:
    """Run what is missing, ``jobs`` processes of ``threads`` threads side by side.

    ``jobs=0`` runs nothing. Returns, and keeps in ``comparison.json``, the table and the state of
    every run: ``finished``, ``failed`` with its error, ``started`` or ``missing``.

    Raises:
        ConfigError: before anything is run, where a row is unusable or ``out`` holds other runs.
    """
    runs = plan(table)
    states = {run.folder: state_of(run, out) for run in runs}
    todo = [run for run in runs if states[run.folder] != "finished"] if jobs else []
    errors: dict[str, str] = {}

    def keep(run: Run | None = None, error: str | None = None) -> None:
        if run is not None:
            states[run.folder] = "failed" if error else "finished"
            if error:
                errors[run.folder] = error
        atomic_write_json(out / FILE, _record(table, runs, states, errors, threads))

    make_directory(out)
    keep()
    say(f"{len(runs)} runs, {len(runs) - len(todo)} of them not to be run now")
    _work(todo, runs, out, jobs, threads, keep)
    return _record(table, runs, states, errors, threads)


def _record(
    table: Table,
    runs: Sequence[Run],
    states: Mapping[str, str],
    errors: Mapping[str, str],
    threads: int,
) -> dict[str, Any]:
    listed = [
        {"method": r.method, "seed": r.seed, "folder": r.folder, "state": states[r.folder],
         "error": errors.get(r.folder, "")}
        for r in runs
    ]  # fmt: skip
    return {"format": 1, "threads": threads, **asdict(table), "runs": listed}


def _work(
    todo: Sequence[Run], runs: Sequence[Run], out: Path, jobs: int, threads: int,
    keep: Callable[[Run, str | None], None],
) -> None:  # fmt: skip
    """Keep ``jobs`` processes busy; whatever happens, none outlives this one."""
    waiting, active, begun = list(todo), dict[Run, subprocess.Popen[bytes]](), time.monotonic()
    ended = 0
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                _lend_base(run, runs, out)
                active[run] = _start(run, out / run.folder, threads)
            time.sleep(POLL_SECONDS)
            for run in [r for r, process in active.items() if process.poll() is not None]:
                code = active.pop(run).returncode
                ended += 1
                error = _last_words(out / run.folder / "log.txt", code) if code else None
                keep(run, error)
                left = (time.monotonic() - begun) / ended * (len(todo) - ended)
                how = f"FAILED: {error}" if error else "finished"
                say(f"{run.name} {how} ({ended}/{len(todo)}, about {left / 60:.0f} min left)")
    finally:
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()


def _start(run: Run, folder: Path, threads: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mmalign", "train", run.recipe, *run.overrides]
    command += ["--output-dir", str(folder), "--no-preflight", "--no-report"]
    path = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH")) if p)
    env = {**os.environ, **dict.fromkeys(_THREADS, str(threads)), "PYTHONPATH": path}
    with (make_directory(folder) / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def _last_words(log: Path, code: int) -> str:
    """The command's own message where it wrote one, else the end of what it said."""
    lines = [ln.strip() for ln in log.read_text(errors="replace").splitlines() if ln.strip()]
    own = [ln for ln in lines[-20:] if ln.startswith("mmalign: ")]
    said = (own or lines or ["nothing was written"])[-1].removeprefix("mmalign: error: ")
    return f"{said} (exit code {code}, see {log})"


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
        if _base(other) == _base(run) and (source / "result.json").is_file():
            with atomic_directory(target) as partial:
                shutil.copytree(source, partial, dirs_exist_ok=True)
            return


def _base(run: Run) -> tuple[Any, ...]:
    c = run.config
    how = (c.model.adapter, c.model.precision, c.model.attention, c.rollout.size, c.device)
    return (c.policy, *how, c.evaluation)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
