"""The tables of a comparison as Markdown, put between two marks of a page of the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from eval.charts import number
from eval.html import percent, points
from eval.methods.claims import HOW, Decided
from eval.methods.summary import Summary
from eval.methods.words import judged, words_of
from mmalign.runtime.files import atomic_write_text

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def write_markdown(summary: Summary, path: Path | str, name: str = "") -> Path:
    """Put the tables between the marks of a file, or into a new file.

    Args:
        name: stands in the marks, so that a page has room for several comparisons.

    Raises:
        ValueError: the file exists and lacks the marks.
    """
    path = Path(path)
    begin, end = (
        m.replace("results", f"results {name}" if name else "results") for m in (BEGIN, END)
    )
    text = f"{begin}\n\n{tables(summary)}\n{end}\n"
    if path.is_file():
        held = path.read_text(encoding="utf-8")
        if held.count(begin) != 1 or held.count(end) != 1:
            raise ValueError(f"{path} needs one line {begin!r} and one {end!r} to write between")
        top, rest = held.split(begin)
        text = top + text.rstrip("\n") + rest.split(end)[1]
    atomic_write_text(path, text)
    return path


def tables(summary: Summary) -> str:
    """What was run, the methods and the claims."""
    words, others = words_of(summary), judged(summary)
    parts = [
        words.basis(summary) + "\n",
        _table(words.head, (words.cells(line) for line in summary.lines)),
        _table(*others) if others else "",
        _table(IQM_HEAD, iqm_rows(summary)),
        _table(CLAIM_HEAD, (claim_cells(d) for d in summary.decided)) if summary.decided else "",
        diverged(summary),
        unfinished(summary),
    ]
    return "\n".join(p for p in parts if p)


IQM_HEAD = ("method", "interquartile mean of accuracy, over seeds x tasks", "95 % interval")
CLAIM_HEAD = ("claim", "compared", "measure", "difference", "95 % interval", "verdict")


def iqm_rows(summary: Summary) -> list[tuple[str, ...]]:
    """The interquartile mean of each method with its interval."""
    return [
        (
            line.runs.title,
            percent(line.iqm.mean),
            f"[{100 * line.iqm.low:.1f}, {100 * line.iqm.high:.1f}]" if line.iqm.defined else "–",
        )
        for line in summary.lines
    ]


def diverged(summary: Summary) -> str:
    """In which runs training broke down, and why; empty where it did in none."""
    said = "; ".join(summary.comparison.diverged)
    return f"Runs that diverged, judged as they ended: {said}.\n" if said else ""


def unfinished(summary: Summary) -> str:
    """Which runs are not in the tables, and why; empty where all are."""
    said = [
        f"{r['method']} (seed {r['seed']}): {r['state']}{', ' + r['error'] if r['error'] else ''}"
        for r in summary.comparison.unfinished
    ]
    return f"Runs that are not in these tables: {'; '.join(said)}.\n" if said else ""


def claim_cells(found: Decided) -> tuple[str, ...]:
    """One row of the table of claims."""
    claim, interval = found.claim, found.interval
    show = points if claim.measure == "accuracy" and claim.at != "minimum" else _signed
    margin = f", margin {show(claim.margin)}" if claim.margin else ""
    measure = " and ".join(claim.parts) or claim.measure
    times = "" if claim.share == 1 else f"{claim.share:g} × "
    sides = f"{claim.better} − {times}{claim.than}" if claim.share else claim.better
    if interval is None:
        return (claim.says, sides, f"{measure}, {HOW[claim.at]}{margin}", "–", "–", _word(found))
    span = f"[{show(interval.low)}, {show(interval.high)}]" if interval.defined else "–"
    how = f"{measure}, {HOW[claim.at]}{margin}"
    return (claim.says, sides, how, show(interval.mean), span, _word(found))


def _word(found: Decided) -> str:
    return f"{found.word} ({found.why})" if found.why else found.word


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(c.replace('|', '/') for c in row)} |\n" for row in lines)
