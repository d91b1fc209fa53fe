"""Which prompt belongs to which picture: lines in order, tables by file name, text files beside."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmalign.prompts import PromptFileError, read_prompts, read_text

# Of the columns that may name the picture the first present one does.
NAME_COLUMNS = ("image", "file_name", "file", "filename", "path")
Caption = tuple[str, Mapping[str, Any]]  # a prompt and further facts


def captions(files: Sequence[Path], source: str | Path) -> list[Caption]:
    """A prompt and further facts for each of ``files``.

    Args:
        files: the pictures.
        source: one of

            * ``.txt``: one prompt a line, in the order of the pictures, or a single one for all;
            * ``.jsonl`` (``.ndjson``) or ``.csv`` with a column ``prompt``. Where a column
              ``image`` or ``file_name`` names the picture, rows may come in any order and may be
              more than the pictures; a name may hold folders (``a/1.png``). Otherwise rows are
              in the order of the pictures. Further columns are facts;
            * a folder, holding the prompt of ``NAME.png`` in ``NAME.txt``; that of ``a/NAME.png``
              in ``a/NAME.txt`` where there is such a file.

    Raises:
        PromptFileError: unreadable or malformed, a picture without a prompt, a name given twice,
            or another number of prompts than pictures; names the file and the place.
    """
    source = Path(source)
    if source.is_dir():
        return [(_beside(source, file), {}) for file in files]
    if source.suffix.lower() not in (".jsonl", ".ndjson", ".csv"):
        return _in_order([(prompt, {}) for prompt in read_prompts(source)], files, source)
    rows = _csv_rows(source) if source.suffix.lower() == ".csv" else _json_rows(source)
    column = next((c for c in NAME_COLUMNS if rows and c in rows[0]), None)
    if column is None:
        return _in_order([_caption(row, source, n) for n, row in enumerate(rows, 1)], files, source)
    return _by_name(rows, column, files, source)


def _beside(folder: Path, picture: Path) -> str:
    """The text of the picture's name in ``folder``, under as many of its folders as match."""
    name = picture.with_name(f"{picture.stem}.txt")
    tails = [folder / tail for tail in _tails(name) if not tail.startswith("/")]
    if name.absolute().is_relative_to(folder.absolute()):  # beside the pictures, and only there
        tails = [name]
    found = next((text for text in tails if text.is_file()), None)
    if found is None:
        raise PromptFileError(f"picture {picture} has no prompt: {tails[-1]} does not exist")
    return read_text(found).strip()


def _in_order(found: list[Caption], files: Sequence[Path], source: Path) -> list[Caption]:
    if len(found) == len(files):
        return found
    if len(found) == 1:
        return found * len(files)
    raise PromptFileError(
        f"{source}: {len(found)} prompts for {len(files)} pictures; give one, or one each, or "
        f"name the pictures in a column {NAME_COLUMNS[0]!r} (.csv, .jsonl)"
    )


def _by_name(
    rows: Sequence[Mapping[str, Any]], column: str, files: Sequence[Path], source: Path
) -> list[Caption]:
    named: dict[str, Caption] = {}
    for number, row in enumerate(rows, 1):
        name = PurePosixPath(str(row.get(column) or "").replace("\\", "/")).as_posix()
        if name == "." or name in named:
            said = "names no picture" if name == "." else f"names {name!r} a second time"
            raise PromptFileError(f"{source}: record {number} {said} in column {column!r}")
        facts = {k: v for k, v in row.items() if k != column}
        named[name] = _caption(facts, source, number)
    found = [next((named[t] for t in _tails(f) if t in named), None) for f in files]
    missing = [str(f) for f, caption in zip(files, found, strict=True) if caption is None]
    if missing:
        raise PromptFileError(
            f"{source} has no prompt for {len(missing)} of {len(files)} pictures, the first is "
            f"{missing[0]}"
        )
    return [caption for caption in found if caption is not None]


def _tails(path: Path) -> list[str]:
    """``/a/b/c.png``, ``a/b/c.png``, ``b/c.png``, ``c.png``: the most exact name first."""
    parts = path.absolute().parts
    whole = [path.absolute().as_posix(), path.as_posix()]
    return whole + ["/".join(parts[i:]) for i in range(1, len(parts))]


def _caption(row: Mapping[str, Any], source: Path, number: int) -> Caption:
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        has = ", ".join(k for k, v in row.items() if isinstance(v, str) and v.strip()) or "nothing"
        raise PromptFileError(
            f"{source}: record {number} has no text in 'prompt', it has {has}; name the column of "
            "the prompts 'prompt'"
        )
    return prompt.strip(), {k: v for k, v in row.items() if k != "prompt"}


def _csv_rows(source: Path) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(read_text(source), newline=""))
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise PromptFileError(f"{source}: record {number} has more or fewer cells than columns")
    return _some(rows, source)


def _json_rows(source: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(source).split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise PromptFileError(f"{source}, line {number}: not JSON ({error.msg})") from error
        if row is None:
            continue
        if not isinstance(row, dict):
            raise PromptFileError(f"{source}, line {number}: expected an object with 'prompt'")
        rows.append(row)
    return _some(rows, source)


def _some(rows: list[dict[str, Any]], source: Path) -> list[dict[str, Any]]:
    if not rows:
        raise PromptFileError(f"{source} holds no prompt")
    return rows
