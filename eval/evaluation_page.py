"""The report of one evaluation, and what the report of a training shares with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eval.charts import Bars, bar_chart
from eval.comparison import words
from eval.gallery import card, fair_sample, grid
from eval.html import Child, Markup, duration, el, facts, page, percent, section, table
from eval.result import EvalResult, Row
from eval.statistics import Interval
from eval.trust import cautions
from mmalign.runtime.files import atomic_write_bytes

EXAMPLES = 8  # pictures in a gallery
REASONS = 8  # reasons for unscored pictures that are listed
REASON = 160  # characters of one


def evaluation_report(result: EvalResult, path: Path | str) -> Path:
    """Write the report of one evaluation to ``path`` and return it."""
    title = " ".join(s for s in (result.policy, result.label) if s)
    header = el("header", el("p", f"Evaluation report: {result.benchmark} v{result.version}",
                             class_="kicker"), el("h1", title), _headline(result),
                _tiles(result))  # fmt: skip
    body: list[Child] = [
        header,
        task_section(result),
        _numbers(result),
        *_galleries(result),
        _failures(result),
        section("Settings", facts(result.settings)),
        section("Provenance", facts(result.provenance)),
        footer(),
    ]
    target = Path(path)
    atomic_write_bytes(target, page(f"{title}: evaluation report", *body).encode())
    return target


def task_section(result: EvalResult, title: str = "By task") -> Markup:
    """Bars and a table of every task, the mean over tasks first."""
    rows = [Bars("mean over tasks", (result.accuracy,), strong=True)]
    rows += [Bars(words(t), (s.accuracy,)) for t, s in result.tasks.items()]
    shares = result.unit == "share"
    name = "accuracy" if shares else "score"
    strict = ("unscored as wrong",) if shares else ()
    head = ("task", name, *strict, "pictures", "unscored", "prompts", "resampled")
    summaries = {"mean over tasks": result.overall, **result.tasks}
    body = [
        (
            words(task),
            _value(s.accuracy.mean, result.unit),
            *(percent(s.accuracy_counting_unscored_as_wrong.mean) for _ in strict),
            str(s.n),
            str(s.unscored),
            str(s.accuracy_counting_unscored_as_wrong.clusters),
            s.accuracy.unit,
        )
        for task, s in summaries.items()
    ]
    note = (
        "95 % bootstrap intervals. Prompts are resampled; tasks of fewer than ten prompts "
        "resample pictures and say nothing about other prompts."
    )
    chart = el("div", bar_chart(rows, (name,), shares=shares), class_="card")
    return section(title, chart, table(head, body), note=note)


def accuracy_said(result: EvalResult) -> str:
    """The overall number with its interval, in words."""
    return _said(result.accuracy, result.unit)


def legend() -> Markup:
    """What the frames of pictures mean."""
    kinds = (("ok", "correct"), ("no", "wrong"), ("na", "not scored"))
    return el("p", [el("span", el("i", class_=c), w) for c, w in kinds], class_="legend")


def footer() -> Markup:
    """The last line of every page."""
    return el("footer", "Written by mmalign. One file, no script, nothing fetched.")


def _headline(result: EvalResult) -> Markup:
    strict = result.accuracy_counting_unscored_as_wrong
    unscored = result.overall.unscored
    shares = result.unit == "share"
    small = [el("small", f"Mean of {len(result.tasks)} task means over scored pictures.")]
    if unscored and shares:
        small.append(el("small", f"{unscored} of {result.overall.n} pictures could not be scored; "
                        f"counting them as wrong: {_said(strict)}."))  # fmt: skip
    small += [el("small", said) for said in cautions(result)]
    name = "Accuracy" if shares else "Mean score"
    return el("p", f"{name} {accuracy_said(result)}.", *small, class_="verdict none")


def _numbers(result: EvalResult) -> Markup | None:
    if not result.numbers:
        return None
    rows = [(name, "–" if v is None else f"{v:.4g}") for name, v in result.numbers.items()]
    return section("As the benchmark's authors report it", table(("number", "value"), rows))


def _tiles(result: EvalResult) -> Markup:
    said = (
        (f"{len(result.rows):,}", "pictures"),
        (duration(result.seconds), "generating and judging"),
        (f"{result.nfe:,.0f}", "network evaluations"),
        (f"{result.images_per_second:.2f}", "pictures per second"),
    )
    return el("dl", [el("div", el("dt", n), el("dd", v)) for v, n in said], class_="tiles")


def _galleries(result: EvalResult) -> list[Markup]:
    if not any(result.image_path(r) for r in result.rows):
        note = "The pictures of this evaluation were not kept."
        return [section("Pictures", el("p", note, class_="empty"))]
    # Stable sort: ties keep the benchmark's order, which takes the tasks in turn.
    scored = [r for r in result.rows if r.valid]
    ranked = sorted(scored, key=lambda r: (r.value or 0.0, r.partial or 0.0))
    middle = max(0, len(ranked) // 2 - EXAMPLES // 2)
    fair = fair_sample(result.rows, 2 * EXAMPLES)
    return [
        _gallery(result, "A fair sample", fair, "Drawn at random with a fixed seed, without "
                 "regard to scores.", marks=True),
        _gallery(result, "Best", ranked[::-1][:EXAMPLES], "Highest score, then partial credit."),
        _gallery(result, "Median", ranked[middle : middle + EXAMPLES], "Around the middle score, "
                 "then partial credit."),
        _gallery(result, "Worst", ranked[:EXAMPLES], "Lowest score, then partial credit."),
    ]  # fmt: skip


def _failures(result: EvalResult) -> Markup | None:
    """Reasons of unscored pictures, most frequent first, and the first of the pictures."""
    failed = [r for r in result.rows if not r.valid]
    if not failed:
        return None
    counts = Counter(r.note[:REASON] or "no reason given" for r in failed).most_common(REASONS)
    reasons = table(("reason", "pictures"), [(why, str(n)) for why, n in counts])
    shown = [r for r in failed if result.image_path(r)][:EXAMPLES]
    cards = grid([card(result, r) for r in shown], single=True) if shown else None
    note = f"{len(failed)} pictures could not be judged; these are the first."
    return section("Not scored", reasons, cards, note=note)


def _gallery(
    result: EvalResult, title: str, rows: Sequence[Row], note: str, marks: bool = False
) -> Markup:
    cards = grid([card(result, r) for r in rows], single=True)
    return section(title, legend() if marks else None, cards, note=note)


def _value(value: float, unit: str) -> str:
    if value != value:
        return "–"
    return percent(value) if unit == "share" else f"{value:.4g}"


def _said(interval: Interval, unit: str = "share") -> str:
    mean = _value(interval.mean, unit)
    if not interval.defined:
        return f"{mean} (too few pictures for an interval)"
    if unit != "share":
        return f"{mean}, 95 % interval [{interval.low:.4g}, {interval.high:.4g}]"
    low, high = 100 * interval.low, 100 * interval.high
    return f"{mean}, 95 % interval [{low:.1f}, {high:.1f}]"
