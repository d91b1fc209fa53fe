"""Self-contained HTML reports: one file each, no script, nothing fetched, opens from disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.charts import Bars, bar_chart
from eval.comparison import Verdict, comparison_chart, comparison_table, judge_pairs, words
from eval.gallery import Pairs, card, fair_sample, grid, pair_card
from eval.html import Child, Markup, duration, el, facts, page, percent, section, table
from eval.panel_section import panel_section
from eval.result import EvalResult, Row
from eval.run_folder import RunFolder, read_run
from eval.statistics import Interval, fewest_changes
from eval.training_sections import (
    hacking_section,
    health_section,
    notes_list,
    record_section,
    reward_section,
    tiles,
)
from mmalign.runtime.files import atomic_write_bytes

PER_TASK = 4  # pairs of pictures shown for each task
EXAMPLES = 8  # pictures in a gallery of fixed, broken, best or worst


def training_report(run_dir: Path | str, path: Path | str | None = None) -> Path:
    """Write the report of a training run and return its path, ``report.html`` in its folder.

    Works at any time: missing pieces (no evaluation yet, no update yet) are named on the page.

    Raises:
        FileNotFoundError: ``run_dir`` is not a folder.
    """
    run = read_run(Path(run_dir))
    pairs, verdict = _compare(run)
    recipe = run.run.get("recipe")
    title = str(recipe) if recipe else run.path.resolve().name
    body: list[Child] = [
        el("header", el("p", "Training report", class_="kicker"), el("h1", title),
           verdict.html(), tiles(run), notes_list(run)),
        _before_after(run, pairs),
        reward_section(run),
        health_section(run),
        *(_pictures(pairs) if pairs is not None else ()),
        hacking_section(run, pairs),
        panel_section(run),
        record_section(run),
        _footer(),
    ]  # fmt: skip
    target = run.path / "report.html" if path is None else Path(path)
    atomic_write_bytes(target, page(f"{title}: training report", *body).encode())
    return target


def evaluation_report(result: EvalResult, path: Path | str) -> Path:
    """Write the report of one evaluation to ``path`` and return it."""
    title = " ".join(s for s in (result.policy, result.label) if s)
    header = el("header", el("p", f"Evaluation report: {result.benchmark} v{result.version}",
                             class_="kicker"), el("h1", title), _headline(result),
                _evaluation_tiles(result))  # fmt: skip
    body: list[Child] = [
        header,
        _task_section(result),
        *_galleries(result),
        section("Settings", facts(result.settings)),
        section("Provenance", facts(result.provenance)),
        _footer(),
    ]
    target = Path(path)
    atomic_write_bytes(target, page(f"{title}: evaluation report", *body).encode())
    return target


def _compare(run: RunFolder) -> tuple[Pairs | None, Verdict]:
    if run.before is None and run.after is None:
        return None, Verdict("none", "No verdict: this run has not been evaluated.")
    if run.before is None or run.after is None:
        there, lacking = ("after", "before") if run.before is None else ("before", "after")
        result = run.after if run.before is None else run.before
        assert result is not None
        said = f"No verdict yet: there is no evaluation {lacking} training. "
        return None, Verdict("none", f"{said}Accuracy {there}: {_accuracy(result)}.")
    try:
        pairs = Pairs(run.before, run.after)
    except ValueError as error:
        return None, Verdict("none", f"No verdict: {error}.")
    return pairs, judge_pairs(pairs)


def _before_after(run: RunFolder, pairs: Pairs | None) -> Markup:
    if pairs is not None:
        note = (
            "Bars: share of scored pictures that are correct, with 95 % bootstrap intervals. "
            "Table: differences pair by pair; coloured only where the interval excludes zero and "
            f"at least {fewest_changes()} pairs changed."
        )
        body = (comparison_chart(pairs), comparison_table(pairs))
        return section("Before and after, by task", *body, note=note)
    single = run.before or run.after
    if single is None:
        return section("Before and after, by task", el("p", "Not evaluated yet.", class_="empty"))
    return _task_section(single, f"Evaluation {'before' if run.before else 'after'} training")


def _pictures(pairs: Pairs) -> list[Markup]:
    blocks: list[Child] = [_legend()]
    for task in pairs.tasks:
        chosen = pairs.sample(task, PER_TASK)
        blocks.append(el("h3", words(task)))
        blocks.append(grid([pair_card(pairs, a, b) for a, b in chosen]))
    note = (
        f"Left before, right after, same prompt and same noise. {PER_TASK} per task, drawn at "
        "random with a fixed seed and without regard to scores."
    )
    return [
        section("Same prompts, same seeds", *blocks, note=note),
        _changes(pairs, "Fixed", pairs.fixed, "Not correct before, correct after"),
        _changes(pairs, "Broken", pairs.broken, "Correct before, not correct after"),
    ]


def _changes(pairs: Pairs, title: str, rows: Sequence[tuple[Row, Row]], what: str) -> Markup:
    total = f"{what}: {len(rows)} of {len(pairs.rows)} pairs"
    if not rows:
        return section(title, note=f"{total}.")
    shown = fair_sample(rows, EXAMPLES, title)
    cards = grid([pair_card(pairs, a, b, note=True) for a, b in shown])
    which = "all shown" if len(shown) == len(rows) else f"{len(shown)} drawn at random shown"
    return section(title, cards, note=f"{total}; {which}. Chosen for what changed, so no measure "
                   "of how often it does.")  # fmt: skip


def _legend() -> Markup:
    kinds = (("ok", "correct"), ("no", "wrong"), ("na", "not scored"))
    return el("p", [el("span", el("i", class_=c), w) for c, w in kinds], class_="legend")


def _headline(result: EvalResult) -> Markup:
    strict = result.accuracy_counting_unscored_as_wrong
    unscored = result.overall.unscored
    small = [el("small", f"Mean of {len(result.tasks)} task means over scored pictures.")]
    if unscored:
        small.append(el("small", f"{unscored} of {result.overall.n} pictures could not be scored; "
                        f"counting them as wrong: {_said(strict)}."))  # fmt: skip
    return el("p", f"Accuracy {_accuracy(result)}.", *small, class_="verdict none")


def _accuracy(result: EvalResult) -> str:
    return _said(result.accuracy)


def _said(interval: Interval) -> str:
    if not interval.defined:
        return f"{percent(interval.mean)} (too few pictures for an interval)"
    low, high = 100 * interval.low, 100 * interval.high
    return f"{percent(interval.mean)}, 95 % interval [{low:.1f}, {high:.1f}]"


def _evaluation_tiles(result: EvalResult) -> Markup:
    said = (
        (f"{len(result.rows):,}", "pictures"),
        (duration(result.seconds), "generating and judging"),
        (f"{result.nfe:,.0f}", "network evaluations"),
        (f"{result.images_per_second:.2f}", "pictures per second"),
    )
    return el("dl", [el("div", el("dt", n), el("dd", v)) for v, n in said], class_="tiles")


def _task_section(result: EvalResult, title: str = "By task") -> Markup:
    rows = [Bars("mean over tasks", (result.accuracy,), strong=True)]
    rows += [Bars(words(t), (s.accuracy,)) for t, s in result.tasks.items()]
    head = ("task", "accuracy", "unscored as wrong", "pictures", "unscored", "prompts", "resampled")
    summaries = {"mean over tasks": result.overall, **result.tasks}
    body = [
        (
            words(name),
            percent(s.accuracy.mean),
            percent(s.accuracy_counting_unscored_as_wrong.mean),
            str(s.n),
            str(s.unscored),
            str(s.accuracy_counting_unscored_as_wrong.clusters),
            s.accuracy.unit,
        )
        for name, s in summaries.items()
    ]
    note = (
        "95 % bootstrap intervals. Prompts are resampled; tasks of fewer than ten prompts "
        "resample pictures and say nothing about other prompts."
    )
    chart = el("div", bar_chart(rows, ("accuracy",)), class_="card")
    return section(title, chart, table(head, body), note=note)


def _galleries(result: EvalResult) -> list[Markup]:
    scored = [r for r in result.rows if r.valid]
    if not any(result.image_path(r) for r in result.rows):
        note = "The pictures of this evaluation were not kept."
        return [section("Pictures", el("p", note, class_="empty"))]
    # Stable sort: ties keep the benchmark's order, which takes the tasks in turn.
    ranked = sorted(scored, key=lambda r: (r.value or 0.0, r.partial or 0.0))
    fair = fair_sample(result.rows, 2 * EXAMPLES)
    failed = [r for r in result.rows if not r.valid]
    parts = [
        _gallery(result, "A fair sample", fair, "Drawn at random with a fixed seed, without "
                 "regard to scores.", legend=True),
        _gallery(result, "Best", ranked[::-1][:EXAMPLES], "Highest score, then partial credit."),
        _gallery(result, "Worst", ranked[:EXAMPLES], "Lowest score, then partial credit."),
    ]  # fmt: skip
    if failed:
        note = f"{len(failed)} pictures could not be judged; these are the first."
        parts.append(_gallery(result, "Not scored", failed[:EXAMPLES], note))
    return parts


def _gallery(
    result: EvalResult, title: str, rows: Sequence[Row], note: str, legend: bool = False
) -> Markup:
    cards = grid([card(result, r) for r in rows], single=True)
    return section(title, _legend() if legend else None, cards, note=note)


def _footer() -> Markup:
    return el("footer", "Written by mmalign. One file, no script, nothing fetched.")
