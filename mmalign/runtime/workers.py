"""Work in processes of their own, some side by side, each with its own log."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mmalign.runtime.files import atomic_write_json, make_directory
from mmalign.runtime.log import say

POLL_SECONDS = 0.2
LOG = "log.txt"
_ROOT = Path(__file__).resolve().parents[2]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # other systems do not read it


class Named(Protocol):
    """A piece of work, with what to call it and its folder below the common one."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def folder(self) -> str:
        """Where it writes."""
        ...


J = TypeVar("J", bound=Named)


def start_python(
    arguments: Sequence[str], folder: Path, threads: int = 1
) -> subprocess.Popen[bytes]:
    """This Python with ``arguments``, on ``threads`` threads, writing to ``folder/log.txt``.

    On Linux its memory comes in huge pages unless the environment says otherwise: activations are
    megabytes that come and go, and their page faults cost a network on the CPU a quarter of its
    time.
    """
    path = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH")) if p)
    env = {**_HUGE_PAGES, **os.environ, **dict.fromkeys(_THREADS, str(threads))}
    env["PYTHONPATH"] = path
    with (make_directory(folder) / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, env=env
        )


def work(
    todo: Sequence[J], out: Path, jobs: int, start: Callable[[J], subprocess.Popen[bytes]],
    keep: Callable[[J, str | None], None],
) -> None:  # fmt: skip
    """Keep ``jobs`` processes busy; whatever happens, none outlives this one.

    Args:
        keep: told of each piece that has ended, with its error where it failed.
    """
    waiting, active, begun = list(todo), dict[J, subprocess.Popen[bytes]](), time.monotonic()
    ended = 0
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                job = waiting.pop(0)
                active[job] = start(job)
            time.sleep(POLL_SECONDS)
            for job in [j for j, process in active.items() if process.poll() is not None]:
                code = active.pop(job).returncode
                ended += 1
                error = last_words(out / job.folder / LOG, code) if code else None
                keep(job, error)
                left = (time.monotonic() - begun) / ended * (len(todo) - ended)
                how = f"FAILED: {error}" if error else "finished"
                say(f"{job.name} {how} ({ended}/{len(todo)}, about {left / 60:.0f} min left)")
    finally:
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()


def last_words(log: Path, code: int) -> str:
    """The command's own message where it wrote one, else the end of what it said."""
    lines = [ln.strip() for ln in log.read_text(errors="replace").splitlines() if ln.strip()]
    own = [ln for ln in lines[-20:] if ln.startswith("mmalign: ")]
    said = (own or lines or ["nothing was written"])[-1].removeprefix("mmalign: error: ")
    return f"{said} (exit code {code}, see {log})"


def run_missing(
    runs: Sequence[J], file: Path, jobs: int, *, states: dict[str, str], errors: dict[str, str],
    start: Callable[[J], subprocess.Popen[bytes]], record: Callable[[], dict[str, Any]],
    judged: Callable[[J], str] = lambda _: "failed",
) -> dict[str, Any]:  # fmt: skip
    """Run what is ``missing`` or ``started``, and keep ``record`` in ``file`` as it goes.

    Args:
        jobs: processes side by side; 0 runs nothing.
        states, errors: of each run's folder; changed as runs end.
        record: what is to be kept, made of them.
        judged: the state of a run whose process ended with an error.
    """
    todo = [run for run in runs if states[run.folder] in ("missing", "started")] if jobs else []

    def keep(run: J, error: str | None) -> None:
        states[run.folder] = judged(run) if error else "finished"
        if error:
            errors[run.folder] = error
        atomic_write_json(file, record())

    make_directory(file.parent)
    atomic_write_json(file, record())
    say(f"{len(runs)} runs, {len(runs) - len(todo)} of them not to be run now")
    work(todo, file.parent, jobs, start, keep)
    return record()


def listed(
    runs: Sequence[Any], states: Mapping[str, str], errors: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Runs with ``method``, ``seed`` and ``folder``, and how each of them stands, as plain data."""
    return [
        {"method": r.method, "seed": r.seed, "folder": r.folder, "state": states[r.folder],
         "error": errors.get(r.folder, "")}
        for r in runs
    ]  # fmt: skip
