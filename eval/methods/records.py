"""Records of a comparison: what its tables are made from, in one small file that can be kept.

An archive holds, of every run that has ended, its settings, log, verdicts and judges' scores; no
weights and no pictures. Unpacked, the runs count as run: tables are written anew, and further rows
are judged beside them, on a machine that never trained any.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from pathlib import Path, PurePosixPath

from eval.methods.judges import FILE as JUDGES
from eval.methods.read import TIMING
from mmalign.runtime.files import atomic_directory, atomic_write_bytes

RUN = "run.json"
# Of a run, by what is there.
KEPT = (
    "config.yaml", "spec.json", RUN, "metrics.jsonl", "panel.jsonl", "eval/*/result.json",
    f"eval/*/{JUDGES}",
)  # fmt: skip


class RecordsError(ValueError):
    """An archive that cannot be read; the message names it and what is wrong."""


def pack(folder: Path | str, archive: Path | str) -> int:
    """Write every run below ``folder`` that has ended into a ``.tar.xz``; returns how many.

    The same runs make the same bytes. Nothing is written where none has ended.
    """
    folder = Path(folder)
    runs = sorted(p.parent for p in folder.glob(f"*/*/{RUN}") if _ended(p))
    files = {f for run in runs for kept in KEPT for f in run.glob(kept)}
    files |= {f for run in runs for f in run.parent.glob(TIMING)}  # of its row
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file in sorted(files):
            content = file.read_bytes()
            entry = tarfile.TarInfo(file.relative_to(folder).as_posix())
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    if runs:
        atomic_write_bytes(archive, lzma.compress(data.getvalue(), preset=6))
    return len(runs)


def unpack(archive: Path | str, folder: Path | str) -> int:
    """Put the runs of an archive that ``folder`` lacks into it; returns how many.

    A run that is there, finished or not, stays as it is.

    Raises:
        RecordsError: not such an archive, or damaged. Nothing of a damaged run is left.
    """
    folder, runs = Path(folder), dict[str, dict[PurePosixPath, bytes]]()
    for name, content in _read(Path(archive)).items():
        if len(name.parts) > 2:
            run, inner = "/".join(name.parts[:2]), PurePosixPath(*name.parts[2:])
            runs.setdefault(run, {})[inner] = content
        elif not (folder / name).exists():  # of a row, such as its timing
            atomic_write_bytes(folder / name, content)
    missing = [run for run in runs if not (folder / run).exists()]
    for run in missing:
        with atomic_directory(folder / run) as partial:
            for inner, content in runs[run].items():
                (partial / inner).parent.mkdir(parents=True, exist_ok=True)
                (partial / inner).write_bytes(content)
    return len(missing)


def _read(archive: Path) -> dict[PurePosixPath, bytes]:
    try:
        with tarfile.open(archive, mode="r:xz") as tar:
            held = {PurePosixPath(m.name): tar.extractfile(m) for m in tar if m.isfile()}
            read = {name: file.read() for name, file in held.items() if file is not None}
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise RecordsError(f"{archive} is no archive of a comparison's records: {error}") from error
    for name in read:
        if name.is_absolute() or ".." in name.parts or len(name.parts) < 2:
            raise RecordsError(f"{archive} holds {str(name)!r}, which is no file of a run")
    return read


def _ended(run: Path) -> bool:
    """Whether the evaluation at its end is there too; steering writes its file after them all."""
    ended = json.loads(run.read_text(encoding="utf-8"))
    judged = "points" in ended or (run.parent / "eval/after/result.json").is_file()
    return bool(ended.get("diverged") or (ended.get("finished") and judged))
