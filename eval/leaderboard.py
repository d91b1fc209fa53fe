"""Leaderboards: every result below a folder, one table for each benchmark, never a mixed one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.comparison import words
from eval.html import Child, Markup, el, page, percent, section, table
from eval.result import EvalResult
from eval.statistics import Interval
from mmalign.runtime.files import atomic_write_bytes

MUST_AGREE = ("version", "options", "scorer")
NUMBERS = 4  # of a benchmark's own numbers shown as columns; results hold them all


class LeaderboardError(ValueError):
    """Results that cannot stand in one table; the message names them and what differs."""


@dataclass(frozen=True)
class Entry:
    """One result, and what must be said beside its number."""

    path: Path
    result: EvalResult

    @property
    def name(self) -> str:
        """Generator and label."""
        return " ".join(s for s in (self.result.policy, self.result.label) if s)

    @property
    def headline(self) -> Interval:
        """What it is ranked by: of shares, with unscored pictures counted as wrong."""
        overall = self.result.overall
        shares = self.result.unit == "share"
        return overall.accuracy_counting_unscored_as_wrong if shares else overall.accuracy

    @property
    def complete(self) -> bool:
        """Whether it is ranked: the whole benchmark, with a number."""
        return not self.result.limited and self.headline.mean == self.headline.mean

    @property
    def marks(self) -> list[str]:
        """What a reader of the table must know."""
        r, said = self.result, []
        if r.limited:
            said.append(f"first {len(r.rows)} of {r.available} pictures only: not ranked")
        if r.overall.unscored:
            said.append(f"{r.overall.unscored} unscored")
        if r.training.get("judged_by"):
            said.append(f"trained on {', '.join(r.training['judged_by'])}, which judges here")
        if r.training.get("seen"):
            said.append(f"{r.training['seen']} of {r.training['prompts']} prompts trained on")
        return said


@dataclass(frozen=True)
class Board:
    """The entries of one benchmark: ranked ones first, best first."""

    benchmark: str
    version: str
    options: dict[str, Any]
    scorer: str
    entries: tuple[Entry, ...]

    @property
    def ranked(self) -> list[Entry]:
        """Entries that cover the whole benchmark."""
        return [e for e in self.entries if e.complete]


def read_boards(folder: Path | str) -> list[Board]:
    """One board for each benchmark among the results below ``folder``.

    Raises:
        FileNotFoundError: no folder, or no result in it.
        LeaderboardError: results of one benchmark in different versions, options or scorers.
    """
    root = Path(folder)
    files = sorted(root.rglob("result.json")) if root.is_dir() else []
    entries = [Entry(f.parent, EvalResult.load(f)) for f in files if _is_evaluation(f)]
    if not entries:
        raise FileNotFoundError(f"{root} holds no result of mmalign evaluate (result.json)")
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.result.benchmark, []).append(entry)
    return [_board(name, group) for name, group in sorted(groups.items())]


def markdown(boards: Sequence[Board]) -> str:
    """The boards as tables of Markdown."""
    parts = ["# Leaderboard"]
    for board in boards:
        head = _head(board)
        rows = [_cells(board, e) for e in board.entries]
        lines = ["| " + " | ".join(_pipe(c) for c in line) + " |" for line in (head, *rows)]
        lines.insert(1, "|" + " --- |" * len(head))
        parts += [f"## {board.benchmark} {board.version}", "\n".join(lines), _about(board)]
    return "\n\n".join(parts) + "\n"


def leaderboard_page(boards: Sequence[Board]) -> str:
    """The boards as one self-contained page."""
    body: list[Child] = [el("header", el("p", "Leaderboard", class_="kicker"),
                            el("h1", ", ".join(b.benchmark for b in boards)))]  # fmt: skip
    body += [_section(board) for board in boards]
    body.append(el("footer", "Written by mmalign. One file, no script, nothing fetched."))
    return page("Leaderboard", *body)


def write_leaderboard(folder: Path | str, out: Path | str | None = None) -> tuple[Path, str]:
    """Write ``leaderboard.html`` and ``leaderboard.md`` into ``out`` (``folder`` by default).

    Returns:
        The page, and the Markdown.

    Raises:
        FileNotFoundError, LeaderboardError: as :func:`read_boards`.
    """
    boards = read_boards(folder)
    target = Path(folder if out is None else out)
    text = markdown(boards)
    atomic_write_bytes(target / "leaderboard.md", text.encode())
    atomic_write_bytes(target / "leaderboard.html", leaderboard_page(boards).encode())
    return target / "leaderboard.html", text


def _is_evaluation(path: Path) -> bool:
    """Other commands write a ``result.json`` too; a generator's result has rows and tasks."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LeaderboardError(f"{path} is not JSON ({error}); delete it") from error
    return isinstance(data, dict) and {"rows", "tasks", "overall"} <= data.keys()


def _board(name: str, group: Sequence[Entry]) -> Board:
    first = group[0]
    for other in group[1:]:
        for key in MUST_AGREE:
            one, two = (_fact(e.result, key) for e in (first, other))
            if one != two:
                raise LeaderboardError(
                    f"results of {name} do not belong in one table: {key} is {one!r} in "
                    f"{first.path} and {two!r} in {other.path}; keep them in folders apart"
                )
    order = sorted(group, key=lambda e: (not e.complete, -_finite(e.headline.mean), e.name))
    settings = first.result.settings
    return Board(name, first.result.version, dict(settings.get("options") or {}),
                 str(settings.get("scorer")), tuple(order))  # fmt: skip


def _head(board: Board) -> list[str]:
    first = board.entries[0].result
    tasks = list(first.tasks) if len(first.tasks) > 1 else []
    own = list(first.numbers)[:NUMBERS]
    fixed = ("", "model", "overall", "95 % interval")
    return [*fixed, *map(words, tasks), *own, "sampling", "pictures", "notes"]


def _cells(board: Board, entry: Entry) -> list[str]:
    first, result = board.entries[0].result, entry.result
    rank = str(board.ranked.index(entry) + 1) if entry.complete else "–"
    tasks = list(first.tasks) if len(first.tasks) > 1 else []
    own = [result.numbers.get(n) for n in list(first.numbers)[:NUMBERS]]
    return [
        rank,
        entry.name,
        _said(entry.headline.mean, result.unit),
        _range(entry.headline, result.unit),
        *(_said(result.tasks[t].accuracy.mean if t in result.tasks else None, result.unit)
          for t in tasks),
        *("–" if v is None else f"{v:.4g}" for v in own),
        _sampling(result),
        str(len(result.rows)),
        "; ".join(entry.marks),
    ]  # fmt: skip


def _sampling(result: EvalResult) -> str:
    s = result.settings
    if "steps" not in s:
        return "pictures made elsewhere"
    return f"{s['steps']} steps, guidance {s['guidance_scale']:g}, {s['width']} x {s['height']}"


def _section(board: Board) -> Markup:
    rows = [_cells(board, e) for e in board.entries]
    return section(f"{board.benchmark} {board.version}", table(_head(board), rows),
                   note=_about(board))  # fmt: skip


def _about(board: Board) -> str:
    options = ", ".join(f"{k}={v}" for k, v in board.options.items()) or "none"
    shares = board.entries[0].result.unit == "share"
    how = "unscored pictures counted as wrong" if shares else "over scored pictures"
    return f"Ranked by the mean over tasks, {how}. Options: {options}. Judge: {board.scorer}."


def _said(value: float | None, unit: str) -> str:
    if value is None or value != value:
        return "–"
    return percent(value) if unit == "share" else f"{value:.4g}"


def _range(interval: Interval, unit: str) -> str:
    if not interval.defined:
        return "too few"
    scale = 100 if unit == "share" else 1
    return f"{scale * interval.low:.4g} to {scale * interval.high:.4g}"


def _finite(value: float) -> float:
    return value if value == value else 0.0


def _fact(result: EvalResult, key: str) -> Any:
    return result.settings.get(key, getattr(result, key, None))


def _pipe(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
