"""Times every row once more, alone: runs side by side slow each other down.

``python -m eval.steering.timing FOLDER`` times the run in ``FOLDER`` at each of its budgets, on one
prompt of each task, and writes ``timing.json`` beside that folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.methods.read import TIMING
from eval.steering.one import FIRST_SEED, One, Spec, read_spec, spot_of
from mmalign.config import from_dict
from mmalign.runtime.files import atomic_write_json
from mmalign.runtime.workers import start_python, work

UNITS = ("nfe", "seconds", "working")


@dataclass(frozen=True, eq=False)
class Timing:
    """A row to be timed by one of its finished runs, whose seed draws the noise."""

    method: str
    spec: Spec
    run: str

    @property
    def name(self) -> str:
        """Such as ``fk, timed alone``."""
        return f"{self.method}, timed alone"

    @property
    def folder(self) -> str:
        """That of the row, relative to the comparison's."""
        return self.method


def time_missing(
    timings: Sequence[Timing], out: Path, threads: int, errors: dict[str, str]
) -> None:
    """Time the rows that were not timed yet, one process at a time.

    Args:
        errors: gets what went wrong, by the name of the row; the runs' own seconds stay then.
    """

    def start(timing: Timing) -> subprocess.Popen[bytes]:
        arguments = ["-m", "eval.steering.timing", str(out / timing.run)]
        return start_python(arguments, out / timing.folder, threads)

    def keep(timing: Timing, error: str | None) -> None:
        if error:
            errors[timing.method] = error

    work([t for t in timings if not _done(t, out)], out, 1, start, keep)


def _done(timing: Timing, out: Path) -> bool:
    file = out / timing.folder / TIMING
    if not file.is_file():
        return False
    kept = json.loads(file.read_text(encoding="utf-8"))["spec"]
    return bool(from_dict(Spec, kept) == timing.spec)


def time_row(spec: Spec, folder: Path) -> list[dict[str, Any]]:
    """What the bare pipeline and each budget take, per prompt, one prompt of each task."""
    one = One(spec, folder)
    first = {request.task: request for request in reversed(one.requests)}
    group, seed = list(first.values()), FIRST_SEED + spec.seed
    one.pictures(group, seed, None)  # the first call loads and allocates
    points = []
    for point in (None, *spec.points):
        _, spent = one.pictures(group, seed, point)
        found = {unit: getattr(spent, unit) / len(group) for unit in UNITS}
        points.append({"spot": spot_of(point), **found})
    return points


def main() -> None:
    """Time the run whose folder is on the command line."""
    folder = Path(sys.argv[1])
    spec = read_spec(folder)
    points = time_row(spec, folder)
    atomic_write_json(folder.parent / TIMING, {"spec": asdict(spec), "points": points})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"mmalign: error: {error}") from error
