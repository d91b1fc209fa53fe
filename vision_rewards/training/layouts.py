"""Label files in the layouts they are found in, as the rows that :mod:`.records` reads.

* JSON lines and ``.parquet`` with the keys of :mod:`vision_rewards.training.records`, or with
  ``prompt``, ``chosen``, ``rejected`` (``tie`` for neither, ``annotator`` for ``user``);
* Pick-a-Pic's columns: ``caption``, ``jpg_0``, ``jpg_1``, ``label_0``, ``label_1``, and
  ``has_label`` and ``user_id`` where they are there;
* a folder with ``pairs.jsonl`` or ``*.parquet``, or one with the folders ``chosen`` and
  ``rejected``: pictures of one name make a pair, whose prompt is in ``prompts/NAME.txt``.

Pictures inside Parquet are written once beside the file, named by their content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.runtime.extras import optional
from mmalign.runtime.files import atomic_write_bytes
from mmalign.runtime.log import read_jsonl
from vision_rewards.labelling.decisions import standing

Row = dict[str, Any]
Place = str
PAIRS_FILE = "pairs.jsonl"
_BATCH = 64  # rows of Parquet in memory at once
_RENAMED = {"caption": "prompt", "annotator": "user", "user_id": "user"}


class LayoutError(ValueError):
    """Nothing that can be read as labels; the message says what was looked for."""


def read_rows(path: Path) -> tuple[list[tuple[Place, Row]], int]:
    """Rows with the place of each, and how many of the file's are no judgement.

    Those are what ``mmalign label`` calls skipped or taken back, and rows of Pick-a-Pic without a
    label.

    Raises:
        LayoutError: no such file or folder, or a folder without labels.
        MissingExtraError: Parquet without pyarrow. LogError: a line is not JSON.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise LayoutError(f"label file {path} does not exist")
    if path.suffix.lower() == ".parquet":
        return _kept(_parquet(path))
    rows = read_jsonl(path)
    if not rows:
        raise LayoutError(f"label file {path} is empty; write one judgement a line")
    said = standing(rows)
    kept, silent = _kept((f"{path}, line {n}", plain(row)) for n, row in said)
    return kept, silent + len(rows) - len(said)


def root_of(path: Path) -> Path:
    """Where the paths of pictures in a label file or folder start."""
    return path if path.is_dir() else path.parent


def plain(row: Mapping[str, Any]) -> Row:
    """A row with the keys of :mod:`vision_rewards.training.records`, whatever it came with."""
    found = {_RENAMED.get(k, k) if _RENAMED.get(k, k) not in row else k: v for k, v in row.items()}
    if "chosen" in found and "rejected" in found:
        tie = bool(found.pop("tie", False))
        a, b = found.pop("chosen"), found.pop("rejected")
        found |= {"image_a": a, "image_b": b, "label": "tie" if tie else "a"}
    if "label_0" in found:
        found = _pick_a_pic(found)
    return found


def _pick_a_pic(row: Row) -> Row:
    """Columns of Pick-a-Pic: ``label_0`` is 1, 0, or 1/2 where neither picture was preferred."""
    kept: Row = {k: v for k, v in row.items() if k in ("prompt", "margin", "weight")}
    if row.get("user") is not None:
        kept["user"] = str(row["user"])
    kept |= {"image_a": row.get("jpg_0"), "image_b": row.get("jpg_1")}
    first, second = row["label_0"], row.get("label_1", None)
    if row.get("has_label") is False:
        return {**kept, "label": None}
    if second is not None and (first, second) == (0.5, 0.5):
        return {**kept, "label": "tie"}
    if second is not None and abs(first + second - 1) > 1e-6:
        return {**kept, "label": f"label_0 {first} and label_1 {second}, whose sum is not 1"}
    return {**kept, "label": first}


def _kept(rows: Iterator[tuple[Place, Row]]) -> tuple[list[tuple[Place, Row]], int]:
    every = list(rows)
    kept = [(place, row) for place, row in every if "label" not in row or row["label"] is not None]
    return kept, len(every) - len(kept)


# --- Parquet ----------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[tuple[Place, Row]]:
    parquet = optional("pyarrow.parquet", "parquet", f"{path.name}, a Parquet file,")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises its own kinds, OSError and ValueError
        raise LayoutError(f"{path} cannot be read as Parquet ({error})") from error
    number = 0
    for batch in file.iter_batches(batch_size=_BATCH):
        for values in batch.to_pylist():
            number += 1
            row = plain({k: v for k, v in values.items() if v is not None})
            yield f"{path}, row {number}", _with_files(row, path)


def _with_files(row: Row, path: Path) -> Row:
    """The row with paths in the place of pictures."""
    folder = path.with_suffix(".pictures")
    return {k: _file(v, folder) if k.startswith("image") else v for k, v in row.items()}


def _file(value: Any, folder: Path) -> Any:
    """Where a picture held in a table lies as a file, relative to the table."""
    if isinstance(value, list):
        return [_file(v, folder) for v in value]
    if isinstance(value, Mapping):  # as the datasets library holds pictures
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, bytes):
        return value
    name = f"{hashlib.sha256(value).hexdigest()[:32]}{_suffix(value)}"
    if not (folder / name).is_file():
        atomic_write_bytes(folder / name, value)
    return f"{folder.name}/{name}"


def _suffix(data: bytes) -> str:
    kinds = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}
    return next((s for start, s in kinds.items() if data.startswith(start)), ".img")


# --- folders ----------------------------------------------------------------------------------


def _folder(path: Path) -> tuple[list[tuple[Place, Row]], int]:
    if (path / PAIRS_FILE).is_file():
        return read_rows(path / PAIRS_FILE)
    tables = sorted(path.glob("*.parquet"))
    if tables:
        parts = [read_rows(table) for table in tables]
        return [row for rows, _ in parts for row in rows], sum(n for _, n in parts)
    if (path / "chosen").is_dir() and (path / "rejected").is_dir():
        return _kept(_named_pairs(path))
    raise LayoutError(
        f"folder {path} holds no {PAIRS_FILE}, no *.parquet, and no folders chosen and rejected"
    )


def _named_pairs(path: Path) -> Iterator[tuple[Place, Row]]:
    """Pictures of one name under ``chosen`` and ``rejected``; a missing partner stays missing."""
    sides = {
        side: {f.stem: f for f in sorted((path / side).iterdir()) if not f.name.startswith(".")}
        for side in ("chosen", "rejected")
    }
    for name in sorted(sides["chosen"].keys() | sides["rejected"].keys()):
        files = [sides[s].get(name, path / s / name) for s in ("chosen", "rejected")]
        a, b = (f.relative_to(path).as_posix() for f in files)
        row: Row = {"image_a": a, "image_b": b, "label": "a"}
        words = path / "prompts" / f"{name}.txt"
        if words.is_file():
            row["prompt"] = words.read_text(encoding="utf-8").strip()
        yield f"{path}, {name}", row
