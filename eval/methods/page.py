"""The page of a comparison: claims, methods, curves against compute, the same prompts before and
after. One file, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.charts import Bars, Line, bar_chart, line_chart
from eval.gallery import fair_sample, picture
from eval.html import Child, Markup, el, page, section, table
from eval.methods.markdown import CLAIM_HEAD, IQM_HEAD, claim_cells, iqm_rows
from eval.methods.read import MethodRuns
from eval.methods.summary import Summary
from eval.methods.words import Curve, accuracy_is, judged, words_of
from eval.result import EvalResult
from eval.statistics import Interval
from mmalign.runtime.files import atomic_write_bytes

_TONES = {"supported": "up", "not supported": "down", "undecided": "flat"}
STYLE = """
main{max-width:1240px}
.words td,.words thead th:not(:first-child){text-align:left;white-space:normal}
.words td:nth-child(4),.words td:nth-child(5){white-space:nowrap}
.words tbody tr:first-child>*{font-weight:400}.words tbody th{min-width:200px}
.methods tbody th{min-width:118px}.methods tbody tr:first-child>*{font-weight:400}
.methods td:last-child{white-space:normal;min-width:170px}
.words td:last-child{min-width:104px}
.small svg .l1.faint{stroke-width:1.5;opacity:.9}
.sheet{border-collapse:separate;border-spacing:8px 6px;width:auto}
.sheet th,.sheet td{border:0;padding:0;vertical-align:middle}
.sheet tbody th{text-align:right;padding-right:8px;font-size:13px;max-width:170px}
.sheet thead th{width:96px;font-weight:400;font-size:12px;line-height:1.3;vertical-align:bottom}
.sheet td .pic{width:96px;position:relative}
.sheet .shot{margin:0}
"""


def comparison_page(summary: Summary, path: Path | str) -> Path:
    """Write the page to ``path`` and return it."""
    words = words_of(summary)
    body: list[Child] = [
        el("style", Markup(STYLE)),
        _header(summary),
        _claims(summary),
        _methods(summary),
        *[_curves(summary, curve) for curve in words.curves(summary)],
        _pictures(summary),
        section("How to read this", el("ul", [el("li", s) for s in words.how], class_="notes")),
        el("footer", f"Written by {words.command}. One file, no script, nothing fetched."),
    ]
    atomic_write_bytes(Path(path), page(words.title, *body).encode())
    return Path(path)


def _header(summary: Summary) -> Markup:
    c, own = summary.comparison, words_of(summary)
    gained = sum(ln.word == "supported" for ln in summary.lines)
    words = [d.word for d in summary.decided]
    said = (
        f"{gained} of {len(summary.lines)} rows gain over the base; of {len(words)} claims "
        f"{words.count('supported')} supported, {words.count('not supported')} not supported, "
        f"{words.count('undecided')} undecided."
    )
    missing = c.unfinished
    note = [el("small", own.basis(summary))]
    if missing:
        note.append(el("small", f"{len(missing)} of {len(c.table['runs'])} runs are not finished "
                       "and are left out."))  # fmt: skip
    failed = [f"Failed: {r['method']}, seed {r['seed']}: {r['error']}" for r in missing
              if r["error"]]  # fmt: skip
    failed += [f"Diverged: {said}" for said in c.diverged]
    return el(
        "header",
        el("p", own.command, class_="kicker"),
        el("h1", own.title),
        el("p", said, *note, class_="verdict none"),
        el("ul", [el("li", f) for f in failed], class_="notes") if failed else None,
    )


def _claims(summary: Summary) -> Markup | None:
    if not summary.decided:
        return None
    rows = []
    for found in summary.decided:
        *cells, word = claim_cells(found)
        rows.append((*cells, el("span", word, class_=_TONES[found.word])))
    note = (
        "A claim is supported where the whole 95 % interval of the paired difference lies above "
        "its margin (zero unless said), not supported where the whole interval lies below, else "
        "undecided. Of twenty intervals one is expected to miss."
    )
    return section("Claims", table(CLAIM_HEAD, rows, "numbers words"), note=note)


def _methods(summary: Summary) -> Markup:
    words, rows = words_of(summary), []
    for line in summary.lines:
        cells: list[Child] = [*words.cells(line)]
        cells[words.verdict] = el("span", cells[words.verdict], class_=_TONES[line.word])
        rows.append(cells)
    start = _start(summary)
    bars = [Bars(words.start, (start,))]
    bars += [Bars(ln.runs.title, (ln.accuracy,), strong=i == 0)
             for i, ln in enumerate(summary.lines)]  # fmt: skip
    aim = [(ln.runs.title, ln.runs.row.get("claim", ""), ln.runs.row.get("paper", ""))
           for ln in summary.lines if not ln.runs.control]  # fmt: skip
    folds = [
        _fold("Interquartile mean over seeds x tasks", table(IQM_HEAD, iqm_rows(summary))),
        _fold("What each paper says", table(("method", "headline claim", "arXiv"), aim,
                                            "numbers words")),
    ]  # fmt: skip
    card = el("div", bar_chart(bars, ("accuracy",)), class_="card")
    methods = table(words.head, rows, "numbers methods")
    found = judged(summary)
    others = [table(*found, "numbers methods")] if found else []
    return section("Methods", card, methods, *others, *folds, note=words.methods)


def _first(summary: Summary) -> MethodRuns:
    """Whose start stands for that of all."""
    return summary.comparison.methods[summary.reference or summary.lines[0].runs.name]


def _start(summary: Summary) -> Interval:
    """Accuracy of the base; its interval is that of one evaluation."""
    return _first(summary).runs[0].results[0].accuracy_counting_unscored_as_wrong


def _curves(summary: Summary, curve: Curve) -> Markup:
    scale: list[float] = []
    if curve.measure is not None:  # one scale for one measure
        found = [i for ln in summary.lines for i in summary.curve(ln.runs.name, curve.measure)[1]]
        scale = [curve.scale * v for i in found for v in (i.mean, i.low, i.high)]
    cards = [_curve(summary, ln.runs, curve, scale) for ln in summary.lines if ln.runs.points > 1]
    return section(curve.title, el("div", *cards, class_="small"), note=curve.note)


def _curve(summary: Summary, runs: MethodRuns, curve: Curve, scale: Sequence[float]) -> Markup:
    measure = curve.measure or str(runs.row["proxies"][0])
    lines = [_line(summary, runs.name, curve, measure, beside=False)]
    other = summary.beside(runs.name)
    if other is not None:
        lines.append(_line(summary, other, curve, measure, beside=True))
    said = str(runs.row.get("claim", "")) if curve.measure else measure
    caption = el("figcaption", runs.title, el("span", said))
    chart = line_chart(lines, 300, 170, label=runs.title, cover=scale)
    return el("figure", caption, chart, class_="card")


def _line(summary: Summary, name: str, curve: Curve, measure: str, beside: bool) -> Line:
    grid, found = summary.curve(name, measure)
    x = grid / curve.unit if curve.against == "nfe" else summary.comparison.seconds(name)
    mean, low, high = (
        [curve.scale * getattr(i, part) for i in found] for part in ("mean", "low", "high")
    )
    banded = bool(np.isfinite(low).all()) and not beside
    return Line(
        summary.comparison.methods[name].title, [float(v) for v in x], mean,
        low if banded else None, high if banded else None, faint=beside,
    )  # fmt: skip


def _pictures(summary: Summary) -> Markup:
    """A sheet: one column for each task, one row for each method, same prompts and seeds."""
    words, start = words_of(summary), _first(summary).runs[0]
    first = start.results[0]
    keys = _columns(first)
    by_key = {r.key: r for r in first.rows}
    head = ("", *[by_key[k].prompt for k in keys])
    rows: list[Sequence[Child]] = [(words.start, *_row(first, keys, "before"))]
    for line in summary.lines:
        run = next((r for r in line.runs.runs if r.seed == start.seed), line.runs.runs[0])
        rows.append((line.runs.title, *_row(run.results[-1], keys, "after")))
    note = (
        "One prompt of each task, drawn at random with a fixed seed and without regard to scores; "
        f"the same prompt and the same noise in every row, seed {start.seed}. "
        f"Green: {accuracy_is(summary)} is 1."
    )
    sheet = table(head, rows, "sheet")
    return section("Same prompts, same seeds", sheet, note=note)


def _columns(result: EvalResult) -> list[str]:
    tasks = dict.fromkeys(r.task for r in result.rows)
    return [fair_sample([r for r in result.rows if r.task == t], 1, t)[0].key for t in tasks]


def _row(result: EvalResult, keys: Sequence[str], role: str) -> list[Child]:
    rows = {r.key: r for r in result.rows}
    return [el("div", picture(result, rows[k], role), class_="shot") for k in keys]


def _fold(title: str, body: Markup) -> Markup:
    return el("details", el("summary", title), body)
