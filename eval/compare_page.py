"""A comparison as a page, a table for the terminal, and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.charts import Bars, bar_chart
from eval.compare import Compared, Comparison, Outcome, Unit, rows_by_prompt
from eval.comparison import words
from eval.gallery import fair_sample, grid, picture
from eval.html import Child, Markup, el, facts, page, percent, points, section, table
from eval.result import EvalResult
from eval.statistics import Interval, bootstrap_mean
from mmalign.runtime.files import atomic_write_bytes

SHOWN = 6  # prompts of each outcome in a gallery
HEAD = ("model", "mean", "baseline", "difference", "95 % interval", "win", "tie", "loss", "p",
        "adjusted p")  # fmt: skip
_TITLES: dict[Outcome, str] = {"win": "Won", "tie": "Tied", "loss": "Lost"}


def comparison_page(found: Comparison, path: Path | str) -> Path:
    """Write the page of a comparison and return its path."""
    body: list[Child] = [
        el("header", el("p", f"{found.baseline.benchmark} v{found.baseline.version}, compared",
                        class_="kicker"), el("h1", f"Against {found.name}"),
           *[_verdict(c) for c in found.others]),
        section("Differences from the baseline", table(HEAD, [row(c) for c in found.others]),
                note="Prompt by prompt, mean over tasks. p: permutation of whole prompts; "
                     "adjusted for all comparisons on this page (Holm)."),
        *[_tasks(found, c) for c in found.others],
        *[_gallery(found, c) for c in found.others],
        section("Settings of the baseline", facts(found.baseline.settings)),
        *[section(f"Settings of {c.name}", facts(c.result.settings)) for c in found.others],
        el("footer", "Written by mmalign. One file, no script, nothing fetched."),
    ]  # fmt: skip
    target = Path(path)
    atomic_write_bytes(target, page(f"Comparison with {found.name}", *body).encode())
    return target


def row(one: Compared) -> list[str]:
    """One comparison as cells under :data:`HEAD`."""
    unit, d = one.result.unit, one.difference
    counts = [str(one.count(o)) for o in _TITLES]
    return [
        one.name,
        _value(d.after, unit),
        _value(d.before, unit),
        _change(d.interval.mean, unit),
        _range(d.interval, unit),
        *counts,
        _p(one.p_value),
        _p(one.adjusted),
    ]


def sentence(one: Compared) -> str:
    """What may be said of a comparison, and no more."""
    size = f"{_change(one.difference.interval.mean, one.result.unit)} "
    size += f"{_range(one.difference.interval, one.result.unit)}"
    tone = {"gain": "better", "loss": "worse", "unclear": "not clearly different"}[one.tone]
    return f"{one.name} is {tone}: {size}, adjusted p {_p(one.adjusted)}."


def to_json(found: Comparison) -> dict[str, Any]:
    """Plain data."""
    return {
        "benchmark": found.baseline.benchmark,
        "version": found.baseline.version,
        "baseline": found.name,
        "comparisons": [c.facts() for c in found.others],
    }


def _verdict(one: Compared) -> Markup:
    small = [el("small", said) for said in one.cautions]
    return el("p", sentence(one), *small, class_=f"verdict {one.tone}")


def _tasks(found: Comparison, one: Compared) -> Markup:
    """Bars of both, and the difference, for each task."""
    both = (found.baseline, one.result)
    unit = one.result.unit
    rows = [Bars(words(t), [_of(r, t) for r in both], of="prompts") for t in one.difference.tasks]
    body = [
        (words(t), _change(i.mean, unit), _range(i, unit), str(i.n))
        for t, i in one.difference.tasks.items()
    ]
    names = (found.name, one.name)
    legend = el("p", [el("span", el("i", class_=f"s{k}"), n) for k, n in enumerate(names)],
                class_="legend")  # fmt: skip
    chart = el("div", legend, bar_chart(rows, names, shares=unit == "share"), class_="card")
    head = ("task", "difference", "95 % interval", "prompts")
    return section(f"By task: {one.name}", chart, table(head, body))


def _of(result: EvalResult, task: str) -> Interval:
    """A task's interval; where the result does not know it, a mean without one."""
    if task in result.tasks:
        return result.tasks[task].accuracy
    return replace(bootstrap_mean([]), mean=math.nan)


def _gallery(found: Comparison, one: Compared) -> Markup:
    mine, theirs = rows_by_prompt(found.baseline), rows_by_prompt(one.result)
    blocks: list[Child] = []
    for outcome, title in _TITLES.items():
        units = [u for u, o in one.outcomes.items() if o == outcome]
        shown = fair_sample(units, SHOWN, outcome)
        count = f"{title}: {len(units)} of {len(one.outcomes)} prompts"
        blocks.append(el("h3", count))
        blocks.append(grid([_card(found, one, u, mine[u], theirs[u]) for u in shown]))
    note = f"Left {found.name}, right {one.name}. Drawn at random with a fixed seed."
    return section(f"Wins, ties and losses: {one.name}", *blocks, note=note)


def _card(found: Comparison, one: Compared, unit: Unit, mine: Any, theirs: Any) -> Markup:
    pair = el("div", picture(found.baseline, mine, found.name),
              picture(one.result, theirs, one.name), class_="pair")  # fmt: skip
    said = theirs.note or mine.note
    return el("figure", pair, el("figcaption", unit[1], el("span", said) if said else None),
              class_="shot")  # fmt: skip


def _value(value: float, unit: str) -> str:
    return percent(value) if unit == "share" else f"{value:.4g}"


def _change(value: float, unit: str) -> str:
    return f"{points(value)} points" if unit == "share" else f"{value:+.4g}"


def _range(interval: Interval, unit: str) -> str:
    if not interval.defined:
        return "too few"
    scale = 100 if unit == "share" else 1
    return f"[{scale * interval.low:.3g}, {scale * interval.high:.3g}]".replace("-", "−")


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def table_rows(found: Comparison) -> Sequence[Sequence[str]]:
    """The comparisons for a terminal."""
    return [row(c) for c in found.others]
