"""A comparison of rewards to read: a Markdown table and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from eval.charts import Bars, bar_chart
from eval.html import Child, Markup, el, facts, page, percent, section, table
from eval.reward_benchmarks.result import RewardReport, RewardRow
from eval.statistics import Interval

Cells = list[str]
CHART_LABEL = 20  # characters that fit beside a bar


def interval_text(value: Interval, share: bool = True) -> str:
    """Such as ``71.2 % [64.0, 77.9]``, or ``0.31 [0.20, 0.41]`` for what is no share."""
    if share:
        if not value.defined:
            return percent(value.mean)
        return f"{percent(value.mean)} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    if value.mean != value.mean:
        return "–"
    ends = f" [{value.low:.3f}, {value.high:.3f}]" if value.defined else ""
    return f"{value.mean:.3f}{ends}"


def ranking(report: RewardReport) -> tuple[Cells, list[Cells]]:
    """The table of all rewards: one line each, best first."""
    measures = list(report.meanings)
    head = ["reward", *measures, "scored", "p against the first", "s"]
    rows = []
    for row in report.rows:
        numbers = [
            interval_text(row.measures[m], m in report.shares) if m in row.measures else ""
            for m in measures
        ]
        p = "" if row.p_value is None else f"{row.p_value:.4f}"
        scored = f"{row.items - row.unscored} of {row.items}"
        rows.append([row.label, *numbers, scored, p, f"{row.seconds:.0f}"])
    kept = [i for i, name in enumerate(head) if name not in measures or any(r[i] for r in rows)]
    return [head[i] for i in kept], [[r[i] for i in kept] for r in rows]


def by_part(report: RewardReport, kind: str) -> tuple[Cells, list[Cells]]:
    """The headline by ``categories`` or ``dimensions``, one line a reward; empty where none."""
    scored = (p for r in report.rows for p, v in getattr(r, kind).items() if v.n)
    parts: Sequence[str] = list(dict.fromkeys(scored))
    share = report.headline in report.shares
    rows = []
    for row in report.rows:
        own = getattr(row, kind)
        rows.append([row.label, *(interval_text(own[p], share) if p in own else "" for p in parts)])
    return ["reward", *parts], rows if len(parts) > 1 else []


def markdown(report: RewardReport) -> str:
    """The comparison as a Markdown page."""
    lines = [f"# {_title(report)}", "", _about(report), ""]
    lines += [*_markdown_table(*ranking(report)), ""]
    lines += [f"- {name}: {meaning}" for name, meaning in report.meanings.items()]
    for kind in ("categories", "dimensions"):
        head, rows = by_part(report, kind)
        if rows:
            title = f"## {report.headline[0].upper()}{report.headline[1:]} by {_one(kind)}"
            lines += ["", title, "", *_markdown_table(head, rows)]
    lost = [(row, reason, n) for row in report.rows for reason, n in row.reasons.items()]
    if lost:
        lines += ["", "## Unscored", ""]
        lines += [f"- {row.label}: {n} items: {_line(reason)}" for row, reason, n in lost]
    if report.problems:
        lines += ["", f"## {len(report.problems)} rows of the data were left out", ""]
        lines += [f"- {_line(problem)}" for problem in report.problems]
    return "\n".join(lines) + "\n"


def page_of(report: RewardReport) -> str:
    """The comparison as one HTML page that needs no network."""
    head, rows = ranking(report)
    header = el("header", el("p", "Comparison of rewards", class_="kicker"),
                el("h1", _title(report)), el("p", _about(report), class_="note"))  # fmt: skip
    body: list[Child] = [header, section("Ranking", _chart(report), _wide(head, rows),
                                         _meanings(report))]  # fmt: skip
    for kind in ("categories", "dimensions"):
        head, rows = by_part(report, kind)
        if rows:
            note = f"{report.headline}, with 95 % intervals."
            body.append(section(f"By {_one(kind)}", _wide(head, rows), note=note))
    body += [_unscored(report), _problems(report)]
    body.append(section("Identities", facts({r.label: r.identity for r in report.rows})))
    body.append(section("Provenance", facts(report.provenance)))
    body.append(el("footer", "Written by mmalign. One file, no script, nothing fetched."))
    return page(f"{_title(report)}: comparison of rewards", *body)


def _wide(head: Cells, rows: list[Cells]) -> Markup:
    """A table of many columns: intervals stand below their numbers."""
    return table(head, [[row[0], *map(_stacked, row[1:])] for row in rows])


def _stacked(cell: str) -> Child:
    number, bracket, rest = cell.partition(" [")
    return [number, el("br"), el("small", f"[{rest}")] if bracket else cell


def _short(label: str) -> str:
    """The end of a long label, which tells it from others, for the margin of a chart."""
    return label if len(label) <= CHART_LABEL else f"…{label[1 - CHART_LABEL :]}"


def _chart(report: RewardReport) -> Markup | None:
    if report.headline not in report.shares:
        return None
    bars = [Bars(_short(row.label), (row.headline,), of="judgements") for row in report.rows]
    return el("div", bar_chart(bars, (report.headline,)), class_="card")


def _meanings(report: RewardReport) -> Markup:
    said = []
    for name, meaning in report.meanings.items():
        chance = report.chance.get(name)
        share = name in report.shares
        at = "" if chance is None else f"; a guess: {percent(chance) if share else f'{chance:g}'}"
        said.append(el("li", f"{name}: {meaning}{at}"))
    return el("ul", *said, class_="notes")


def _unscored(report: RewardReport) -> Markup | None:
    lost: list[tuple[RewardRow, str, int]] = [
        (row, reason, n) for row in report.rows for reason, n in row.reasons.items()
    ]
    if not lost:
        return None
    rows = [(row.label, str(n), reason) for row, reason, n in lost]
    note = "Items without a score take no part in the numbers; they are never zero."
    return section("Unscored", table(("reward", "items", "reason"), rows, "facts"), note=note)


def _problems(report: RewardReport) -> Markup | None:
    if not report.problems:
        return None
    lines = [el("li", problem) for problem in report.problems]
    return section("Rows left out", el("ul", *lines, class_="notes"))


def _title(report: RewardReport) -> str:
    return f"{report.benchmark} {report.version} ({report.mode})"


def _about(report: RewardReport) -> str:
    first = report.rows[0]
    return (
        f"{first.items} items; ranked by {report.headline}; 95 % bootstrap intervals, prompts "
        "resampled; p of a paired permutation test against the first."
    )


def _one(kind: str) -> str:
    return {"categories": "category", "dimensions": "dimension"}[kind]


def _markdown_table(head: Cells, rows: list[Cells]) -> list[str]:
    ruler = ["---"] * len(head)
    return [f"| {' | '.join(_line(c) for c in cells)} |" for cells in (head, ruler, *rows)]


def _line(text: str) -> str:
    """Text that stays on one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")
