"""Two or more evaluations of one benchmark, compared prompt by prompt.

A prompt's value is the mean of its scored pictures, so results with other seeds, or pictures that
were made elsewhere, can be compared too.  Differences are means over tasks, as the results are.
The test swaps the two values of whole prompts; p-values of several comparisons with one baseline
are adjusted together (Holm 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from eval.comparison import Tone, tone_of
from eval.metrics.resampling import paired_permutation_test
from eval.result import EvalResult, Row
from eval.statistics import Difference, paired_difference

MUST_AGREE = ("benchmark", "version", "options", "scorer")
OUGHT_TO_AGREE = ("steps", "guidance_scale", "height", "width", "dtype", "autocast", "layout")
Outcome = Literal["win", "tie", "loss"]
Unit = tuple[str, str]  # task and prompt


class ComparisonError(ValueError):
    """Results that are not of one benchmark; the message says what differs."""


@dataclass(frozen=True)
class Compared:
    """One result against the baseline.

    Attributes:
        name: of the result; ``result`` itself.
        difference: over prompts that both scored, this one minus the baseline.
        counting_unscored: the same with every unscored picture a zero; ``None`` for scores, of
            which zero is not the worst.
        p_value: of "both are equally good"; ``adjusted`` for the number of comparisons.
        outcomes: win, tie or loss at each prompt.
        cautions: what a reader must know, in sentences.
    """

    name: str
    result: EvalResult
    difference: Difference
    counting_unscored: Difference | None
    p_value: float
    adjusted: float
    outcomes: Mapping[Unit, Outcome]
    cautions: tuple[str, ...] = ()

    def count(self, outcome: Outcome) -> int:
        """Prompts with this outcome."""
        return sum(o == outcome for o in self.outcomes.values())

    @property
    def tone(self) -> Tone:
        """A gain or a loss only where interval and test agree."""
        return tone_of(self.difference) if self.adjusted <= 0.05 else "unclear"

    def facts(self) -> dict[str, Any]:
        """Plain JSON."""
        d = self.difference
        counts = {o: self.count(o) for o in ("win", "tie", "loss")}  # type: ignore[arg-type]
        return {
            "name": self.name, "baseline_mean": d.before, "mean": d.after,
            "difference": d.interval.to_json(), "p_value": self.p_value,
            "adjusted_p_value": self.adjusted, "prompts": counts, "verdict": self.tone,
            "tasks": {t: i.to_json() for t, i in d.tasks.items()}, "cautions": list(self.cautions),
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A baseline and what was compared with it."""

    name: str
    baseline: EvalResult
    others: tuple[Compared, ...]


def compare_results(results: Mapping[str, EvalResult]) -> Comparison:
    """Compare every result with the first.

    Raises:
        ComparisonError: fewer than two, another benchmark, version, options or scorer, or no prompt
            that both scored.
    """
    if len(results) < 2:
        raise ComparisonError("a comparison needs two results or more")
    (name, baseline), *others = results.items()
    found = [_compared(name, baseline, other, result) for other, result in others]
    adjusted = holm([c.p_value for c in found])
    last = (Compared(**{**c.__dict__, "adjusted": p}) for c, p in zip(found, adjusted, strict=True))
    return Comparison(name, baseline, tuple(last))


def read_results(paths: Sequence[str | Path]) -> dict[str, EvalResult]:
    """Results by a short name, from their folders or ``result.json`` files.

    Raises:
        FileNotFoundError: no such result. ValueError: not a result.
    """
    files = [Path(p) / "result.json" if Path(p).is_dir() else Path(p) for p in paths]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"there is no result {file}; give folders of evaluations")
    found = [(f, EvalResult.load(f)) for f in files]
    names = [_title(r) for _, r in found]
    if len(set(names)) < len(names):  # the folder tells them apart
        names = [f.parent.as_posix() for f, _ in found]
    if len(set(names)) < len(names):
        raise ComparisonError(f"a result is given twice: {', '.join(names)}")
    return dict(zip(names, (r for _, r in found), strict=True))


def by_prompt(result: EvalResult, unscored: float | None = None) -> dict[Unit, float]:
    """Each prompt's mean value over its scored pictures.

    Args:
        unscored: the value of a picture without a score; ``None`` leaves it out.
    """
    values: dict[Unit, list[float]] = {}
    for row in result.rows:
        value = row.value if row.valid else unscored
        if value is not None:
            values.setdefault((row.task, row.prompt), []).append(value)
    return {unit: fmean(v) for unit, v in values.items()}


def rows_by_prompt(result: EvalResult) -> dict[Unit, Row]:
    """The first picture of each prompt, for galleries."""
    first: dict[Unit, Row] = {}
    for row in result.rows:
        first.setdefault((row.task, row.prompt), row)
    return first


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


def _compared(first: str, baseline: EvalResult, name: str, result: EvalResult) -> Compared:
    for key in MUST_AGREE:
        one, two = _fact(baseline, key), _fact(result, key)
        if one != two:
            raise ComparisonError(
                f"{first} and {name} differ in {key}: {one!r} and {two!r}; evaluate both alike"
            )
    a, b = by_prompt(baseline), by_prompt(result)
    shared = [unit for unit in a if unit in b]
    if not shared:
        raise ComparisonError(f"{first} and {name} share no prompt that both scored")
    p = _p_value(a, b, shared)
    strict = None
    if baseline.unit == result.unit == "share":
        x, y = by_prompt(baseline, 0.0), by_prompt(result, 0.0)
        strict = _difference(x, y, [unit for unit in x if unit in y])
    outcomes = {u: _outcome(a[u], b[u]) for u in shared}
    difference = _difference(a, b, shared)
    said = _cautions(baseline, result, difference, strict, len(shared))
    return Compared(name, result, difference, strict, p, p, outcomes, tuple(said))


def _difference(
    a: Mapping[Unit, float], b: Mapping[Unit, float], shared: Sequence[Unit]
) -> Difference:
    keys = {"\n".join(unit): unit for unit in shared}
    return paired_difference(
        {k: a[u] for k, u in keys.items()},
        {k: b[u] for k, u in keys.items()},
        {k: u[1] for k, u in keys.items()},
        {k: u[0] for k, u in keys.items()},
    )


def _p_value(a: Mapping[Unit, float], b: Mapping[Unit, float], shared: Sequence[Unit]) -> float:
    """The permutation test of the mean over tasks, which weighs a prompt by its task's size."""
    sizes: dict[str, int] = {}
    for task, _ in shared:
        sizes[task] = sizes.get(task, 0) + 1
    weights = {u: len(shared) / (len(sizes) * sizes[u[0]]) for u in shared}
    first, second = ([side[u] * weights[u] for u in shared] for side in (a, b))
    return paired_permutation_test(first, second, [u[1] for u in shared])


def _outcome(before: float, after: float) -> Outcome:
    return "win" if after > before else "loss" if after < before else "tie"


def _cautions(
    baseline: EvalResult,
    result: EvalResult,
    found: Difference,
    strict: Difference | None,
    shared: int,
) -> list[str]:
    said = []
    for key in OUGHT_TO_AGREE:
        one, two = baseline.settings.get(key), result.settings.get(key)
        if one != two:
            said.append(f"{key} differs: {one} and {two}.")
    prompts = {(r.task, r.prompt) for r in (*baseline.rows, *result.rows)}
    if len(prompts) > shared:
        said.append(f"{len(prompts) - shared} prompts were not scored in both and are left out.")
    if strict is not None and tone_of(strict) != tone_of(found):
        said.append("Counting unscored pictures as wrong leads to another conclusion.")
    if result.training.get("judged_by"):
        names = ", ".join(result.training["judged_by"])
        said.append(f"It was trained on the reward that judges here ({names}).")
    if result.training.get("seen"):
        said.append(f"{result.training['seen']} of its prompts were trained on.")
    return said


def _fact(result: EvalResult, key: str) -> Any:
    return result.settings.get(key, getattr(result, key, None))


def _title(result: EvalResult) -> str:
    return " ".join(s for s in (result.policy, result.label) if s)
