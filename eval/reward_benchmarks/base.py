"""What every reward benchmark has: a name, a version, items, measures; and how files are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.metrics.pairs import Mode
from eval.reward_benchmarks.items import Item
from eval.reward_benchmarks.measures import Measure

Media = Literal["image", "video", "text"]
MODES = ("compat", "fixed")


class DataError(ValueError):
    """A benchmark's files that cannot be used; the message names the file, the place, the fix."""


class RowError(ValueError):
    """One row that cannot be used; the benchmark goes on without it and names it."""


@dataclass(frozen=True)
class Loaded:
    """Items in the benchmark's order, and what was wrong with the rows that are not among them."""

    items: tuple[Item, ...]
    problems: tuple[str, ...] = ()


class RewardBenchmark:
    """Base of reward benchmarks: set the attributes, implement :meth:`rows` and :meth:`measures`.

    Args:
        data: the official file or folder; ``None`` for a benchmark that makes its own pictures.
        mode: ``compat`` computes what the authors' script computes, quirks included; ``fixed``
            what its definition says.
        options: of the benchmark's own.

    Attributes:
        name, version: of the benchmark; the version changes with anything that changes a number.
        media: what is judged.
        files: what ``data`` has to be, for error messages.

    Raises:
        DataError: an unknown mode, or ``data`` missing or not there.
    """

    name = ""
    version = "1"
    media: Media = "image"
    files = ""

    def __init__(self, data: str | Path | None = None, mode: Mode = "compat") -> None:
        if mode not in MODES:
            raise DataError(f"mode={mode!r} is unknown; use {' or '.join(MODES)}")
        self.mode: Mode = mode
        self.data = Path(data) if data is not None else None
        if self.files and (self.data is None or not self.data.exists()):
            where = "no data was given" if self.data is None else f"{self.data} does not exist"
            raise DataError(
                f"{self.name}: {where}; give {self.files} with --data (data=). Official files are "
                "not part of this project: docs/reward-benchmarks.md says where they come from"
            )

    @property
    def options(self) -> dict[str, Any]:
        """What changes numbers besides version and mode."""
        return {}

    def rows(self) -> Iterable[tuple[str, Callable[[], Sequence[Item]]]]:
        """Place and maker of the items of every row; a maker may raise :class:`RowError`."""
        raise NotImplementedError

    def measures(self) -> Sequence[Measure]:
        """The benchmark's numbers, the headline first."""
        raise NotImplementedError

    def load(self, limit: int | None = None) -> Loaded:
        """Items of the usable rows; ``limit`` takes the first rows that are usable.

        Raises:
            DataError: not a single row can be used, or ``limit`` is below 1.
        """
        if limit is not None and limit < 1:
            raise DataError(f"limit must be 1 or more, got {limit}")
        items: list[Item] = []
        problems: list[str] = []
        used = 0
        for place, make in self.rows():
            if limit is not None and used == limit:
                break
            try:
                made = make()
            except RowError as error:
                problems.append(f"{place}: {error}")
                continue
            items += made
            used += bool(made)  # a row may have nothing to ask, which is no fault of it
        if not items:
            said = "; ".join(problems[:3]) or "the data hold no rows"
            raise DataError(f"{self.name}: no usable row in {self.data}: {said}")
        _check_distinct(items)
        return Loaded(tuple(items), tuple(problems))


def _check_distinct(items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.key in seen:
            raise DataError(f"item {item.key!r} occurs twice; keys must be distinct")
        seen.add(item.key)


def of_rows(
    rows: Iterable[tuple[str, dict[str, Any]]],
    make: Callable[[str, dict[str, Any]], Sequence[Item]],
) -> Iterator[tuple[str, Callable[[], Sequence[Item]]]]:
    """Rows as :meth:`RewardBenchmark.rows` wants them; ``make`` gets a row's place and content."""
    for place, row in rows:
        yield place, lambda place=place, row=row: make(place, row)  # type: ignore[misc]
