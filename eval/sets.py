"""Benchmarks that measure pictures as a set: distances to a reference, diversity.

Such a benchmark has ``measure_set(rows, cells)`` beside ``judge``, which leaves every picture
:data:`PENDING`: once all of them are there, the set gives each its value, and the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from eval.layouts import Cell
from eval.result import EvalResult, Row, finite, summarise
from eval.workers import Workers
from mmalign.pictures import PictureError
from mmalign.types import Score

PENDING = "measured with the whole set"


@dataclass(frozen=True)
class SetMeasure:
    """What a set gives: values of its pictures by key, named numbers, and what is odd, in words."""

    values: Mapping[str, float]
    numbers: Mapping[str, float | None]
    problems: Sequence[str] = field(default_factory=tuple)


def pending(count: int, identity: str = "") -> Score:
    """The score of pictures whose set is not complete yet."""
    return Score.of(torch.full((count,), torch.nan), identity, [PENDING] * count)


def measures_sets(benchmark: Any) -> bool:
    """Whether a benchmark measures pictures as a set."""
    return callable(getattr(benchmark, "measure_set", None))


def check_kept(benchmark: Any, kept: bool) -> None:
    """Refuse, before any work, a set of pictures of which none would be kept.

    Raises:
        ValueError: the benchmark measures sets, and nothing is kept.
    """
    if measures_sets(benchmark) and not kept:
        raise ValueError(
            f"{benchmark.name} measures the pictures as a set, so they have to be kept: give out "
            "(--out DIR)"
        )


def kept_cells(rows: Sequence[Row], folder: Path | None) -> dict[str, Cell]:
    """Where the pictures of ``rows`` are kept below ``folder``."""
    if folder is None:
        return {}
    return {r.key: Cell(folder / r.image) for r in rows if r.image is not None}


def with_set(
    result: EvalResult, benchmark: Any, cells: Mapping[str, Cell], workers: Workers
) -> EvalResult:
    """``result`` with what its pictures give as a set; unchanged for other benchmarks.

    The first process measures, and all have the result.
    """
    if not measures_sets(benchmark):
        return result
    found: SetMeasure | Exception | None = None
    if workers.main:
        waiting = [r for r in result.rows if r.note == PENDING and r.key in cells]
        try:
            found = benchmark.measure_set(waiting, cells)
        except Exception as error:  # the others wait for an answer, whatever it is
            found = error
    found = workers.from_main(found)
    if isinstance(found, Exception):
        raise found
    assert found is not None
    rows = tuple(_valued(row, found.values) for row in result.rows)
    tasks, overall = summarise(rows)
    return replace(
        result,
        rows=rows,
        tasks=tasks,
        overall=overall,
        numbers={**result.numbers, **found.numbers},
        problems=(*result.problems, *found.problems),
    )


def _valued(row: Row, values: Mapping[str, float]) -> Row:
    if row.note != PENDING:
        return row
    value = finite(values[row.key]) if row.key in values else None
    if value is None:
        return replace(row, note="not among the pictures that the set was measured on")
    return replace(row, value=value, valid=True, note="")


def openable(cells: Sequence[Cell]) -> tuple[list[int], list[Any], list[str]]:
    """Cells as files where they are whole files, else opened: numbers, pictures, problems."""
    numbers, pictures, problems = [], [], []
    for k, cell in enumerate(cells):
        try:
            pictures.append(cell.path if cell.part is None else cell.open())
            numbers.append(k)
        except PictureError as error:
            problems.append(str(error))
    return numbers, pictures, problems
