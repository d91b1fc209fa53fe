"""Before against after: the paired difference, and the one sentence it allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from eval.charts import Bars, bar_chart
from eval.gallery import Pairs
from eval.html import Child, Markup, el, percent, points, table
from eval.result import EvalResult, Row
from eval.statistics import Difference, Interval, paired_difference
from eval.trust import cautions_of_training

Tone = Literal["gain", "loss", "unclear"]
MATTERS = ("benchmark", "version", "options", "scorer", "steps", "guidance_scale", "height",
           "width", "dtype")  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """One sentence about a training run, and smaller print. Never more than the interval shows."""

    tone: Tone | Literal["none"]
    sentence: str
    details: tuple[str, ...] = ()

    def html(self) -> Markup:
        """The box at the top of the page."""
        small = [el("small", d) for d in self.details]
        return el("p", self.sentence, *small, class_=f"verdict {self.tone}")


def accuracy_difference(pairs: Pairs) -> Difference | None:
    """Paired difference over pictures scored both times; ``None`` where there are none."""
    return _difference(pairs, _scored)


def difference_counting_unscored(pairs: Pairs) -> Difference | None:
    """Paired difference with every unscored picture a zero."""
    return _difference(pairs, lambda r: r.value if r.valid else 0.0)


def partial_difference(pairs: Pairs) -> Difference | None:
    """Paired difference of partial credit; ``None`` where the benchmark gives none."""
    return _difference(pairs, lambda r: r.partial if r.valid else None)


def judge_pairs(pairs: Pairs) -> Verdict:
    """The verdict on a before / after comparison."""
    found = accuracy_difference(pairs)
    if found is None:
        return Verdict("none", "No verdict: no picture was scored both before and after.")
    details = [_basis(found), *_cautions(pairs, found)]
    return Verdict(tone_of(found), _sentence(found), tuple(details))


def tone_of(found: Difference) -> Tone:
    """``gain`` or ``loss`` only where the interval excludes zero."""
    if not found.excludes_zero:
        return "unclear"
    return "gain" if found.interval.mean > 0 else "loss"


def comparison_chart(pairs: Pairs) -> Markup:
    """Grouped bars, mean over tasks first."""
    before, after = pairs.before, pairs.after
    rows = [Bars("mean over tasks", (before.accuracy, after.accuracy), strong=True)]
    for task in pairs.tasks:
        both = (before.tasks[task].accuracy, after.tasks[task].accuracy)
        rows.append(Bars(words(task), both))
    legend = el("p", el("span", el("i", class_="s0"), "before"),
                el("span", el("i", class_="s1"), "after"), class_="legend")  # fmt: skip
    return el("div", legend, bar_chart(rows, ("before", "after")), class_="card")


def comparison_table(pairs: Pairs) -> Markup:
    """Accuracies and paired differences, pair by pair."""
    head = ("task", "before", "after", "difference, points", "95 % interval", "pairs", "unscored")
    found = accuracy_difference(pairs)
    if found is None:
        return table(head, ())
    counts = _unscored(pairs)
    total = (sum(c[0] for c in counts.values()), sum(c[1] for c in counts.values()))
    rows = [_cells("mean over tasks", found, total)]
    for task in pairs.tasks:
        one = _difference(pairs, _scored, task)
        if one is not None:
            rows.append(_cells(words(task), one, counts[task]))
    return table(head, rows)


def words(task: str) -> str:
    """A task name to read: ``color_attr`` is ``color attr``."""
    return task.replace("_", " ")


def settings_conflicts(before: EvalResult, after: EvalResult) -> list[str]:
    """Settings that must agree for a comparison to be one, and do not."""
    odd = [k for k in MATTERS if before.settings.get(k) != after.settings.get(k)]
    return [f"{k}: {before.settings.get(k)} before, {after.settings.get(k)} after" for k in odd]


def _scored(row: Row) -> float | None:
    return row.value if row.valid else None


def _difference(
    pairs: Pairs, value: Callable[[Row], float | None], task: str | None = None
) -> Difference | None:
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for a, b in pairs.rows:
        one, two = value(a), value(b)
        if one is not None and two is not None and task in (None, a.task):
            before[a.key], after[a.key] = one, two
    if not before:
        return None
    prompts = {a.key: a.prompt for a, _ in pairs.rows}
    tasks = {a.key: a.task for a, _ in pairs.rows}
    return paired_difference(before, after, prompts, tasks)


def _sentence(found: Difference) -> str:
    moved = f"mean accuracy {percent(found.before)} → {percent(found.after)}"
    interval = found.interval
    if not interval.defined:
        return f"No verdict: too few pictures for an interval ({moved})."
    size = f"{points(interval.mean)} points, 95 % interval {_range(interval)}"
    if found.excludes_zero:
        return f"{moved[0].upper()}{moved[1:]}, {size}."
    if _excludes(interval):
        return f"No clear change: {moved}, {size}, but only {found.changed} pictures changed."
    return f"No clear change: {moved}, {size}, which includes zero."


def _basis(found: Difference) -> str:
    return (
        f"Paired difference over {found.pairs} pictures made from the same prompts and seeds, "
        f"{found.changed} of which changed verdict; mean of {len(found.tasks)} task means, "
        "bootstrap within each task."
    )


def _cautions(pairs: Pairs, found: Difference) -> list[str]:
    said = []
    left_out = len(pairs.rows) - found.pairs
    if left_out:
        strict = difference_counting_unscored(pairs)
        assert strict is not None
        said.append(
            f"{left_out} pairs were not scored both times and are left out; counting unscored "
            f"pictures as wrong: {points(strict.interval.mean)} points {_range(strict.interval)}."
        )
        if tone_of(strict) != tone_of(found):
            said.append("Caution: the two ways of counting lead to different conclusions.")
    if pairs.unmatched:
        said.append(f"{pairs.unmatched} pictures exist on one side only and are left out.")
    said += cautions_of_training(pairs.after)
    conflicts = settings_conflicts(pairs.before, pairs.after)
    if conflicts:
        said.append(f"Caution: settings differ ({'; '.join(conflicts)}).")
    if found.pairs and len(found.tasks) < len(pairs.tasks):
        missing = ", ".join(words(t) for t in pairs.tasks if t not in found.tasks)
        said.append(f"Caution: no scored pairs for {missing}; the mean is over the other tasks.")
    return said


def _cells(name: str, found: Difference, unscored: tuple[int, int]) -> tuple[Child, ...]:
    tone = {"gain": "up", "loss": "down", "unclear": "flat"}[tone_of(found)]
    return (
        name,
        percent(found.before),
        percent(found.after),
        el("span", points(found.interval.mean), class_=tone),
        _range(found.interval),
        str(found.pairs),
        f"{unscored[0]} → {unscored[1]}",
    )


def _range(interval: Interval) -> str:
    if not interval.defined:
        return "too few"
    return f"[{points(interval.low, sign=False)}, {points(interval.high, sign=False)}]"


def _excludes(interval: Interval) -> bool:
    return interval.defined and (interval.low > 0 or interval.high < 0)


def _unscored(pairs: Pairs) -> Mapping[str, tuple[int, int]]:
    """Unscored pictures of each task, before and after."""
    counts = dict.fromkeys(pairs.tasks, (0, 0))
    for a, b in pairs.rows:
        one, two = counts[a.task]
        counts[a.task] = (one + (not a.valid), two + (not b.valid))
    return counts
