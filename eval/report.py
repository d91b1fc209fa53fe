"""The report of a training run: one HTML file, no script, nothing fetched, opens from disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.comparison import Verdict, comparison_chart, comparison_table, judge_pairs, words
from eval.evaluation_page import (
    EXAMPLES,
    accuracy_said,
    evaluation_report,
    footer,
    legend,
    task_section,
)
from eval.gallery import Pairs, fair_sample, grid, pair_card
from eval.html import Child, Markup, el, page, section
from eval.panel_section import panel_section
from eval.result import Row
from eval.run_folder import RunFolder, read_run
from eval.statistics import fewest_changes
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
        footer(),
    ]  # fmt: skip
    target = run.path / "report.html" if path is None else Path(path)
    atomic_write_bytes(target, page(f"{title}: training report", *body).encode())
    return target


def _compare(run: RunFolder) -> tuple[Pairs | None, Verdict]:
    if run.before is None and run.after is None:
        return None, Verdict("none", "No verdict: this run has not been evaluated.")
    if run.before is None or run.after is None:
        there, lacking = ("after", "before") if run.before is None else ("before", "after")
        result = run.after if run.before is None else run.before
        assert result is not None
        said = f"No verdict yet: there is no evaluation {lacking} training. "
        return None, Verdict("none", f"{said}Accuracy {there}: {accuracy_said(result)}.")
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
    return task_section(single, f"Evaluation {'before' if run.before else 'after'} training")


def _pictures(pairs: Pairs) -> list[Markup]:
    blocks: list[Child] = [legend()]
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


__all__ = ["evaluation_report", "training_report"]
