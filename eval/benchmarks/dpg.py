"""DPG-Bench (Hu et al. 2024, 2403.05135): long prompts, a graph of yes/no questions each.

For one picture with answers ``a_q`` in {0, 1} to the questions ``q`` of its prompt, each with
parents ``P(q)``::

    s_q  = a_q if all parents have s_p = 1, else 0          (zeroed in place, in file order)
    picture = mean of s_q;   prompt = mean of its 4 pictures;   benchmark = 100 * mean of prompts

Quirks of the published script that ``compat`` reproduces, and ``fixed`` does not:

* its reader drops the first data row, so the first question of the first prompt is missing; where
  another question depends on it, the script fails on that prompt and leaves it out;
* a question that stands before its parent sees the parent's answer before it was zeroed;
* category numbers are of the last picture of each prompt only, before zeroing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eval.benchmarks.base import Numbers, Prompt, PromptBenchmark, RowError, Rows, mean, safe_id
from eval.benchmarks.questions import ask_questions
from eval.benchmarks.tables import cell, one_file, table_rows
from eval.result import Row
from mmalign.protocols import Request
from mmalign.types import Media, Score

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Question:
    """One question: its number, the numbers of its parents, its category and its words."""

    number: int
    parents: tuple[int, ...]
    category: str
    text: str


def cascade(
    answers: Mapping[int, float], parents: Mapping[int, Sequence[int]], in_file_order: bool
) -> dict[int, float]:
    """Scores of the questions: 0 where a parent's is 0.

    Args:
        answers: 1 for yes, else 0, by question number, in the order of the file.
        parents: numbers of each question's parents.
        in_file_order: zero in one pass, as published; else until nothing changes any more.

    Raises:
        KeyError: a parent that is no question of this prompt.
    """
    scores = dict(answers)
    while True:
        before = dict(scores)
        for number in scores:
            if any(scores[p] == 0 for p in parents[number]):
                scores[number] = 0.0
        if in_file_order or scores == before:
            return scores


class DPGBench(PromptBenchmark):
    """1,065 prompts, four pictures each; ``data`` is ``dpg_bench.csv``.

    The published judge is mPLUG-large, which answers "yes" in words; here a judge's probability of
    yes above one half counts as yes.

    Args:
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`; the reward
            is asked each question as its prompt.
    """

    name = "dpg_bench"
    version = "1"
    files = "dpg_bench.csv"
    samples = 4
    reward_spec = "yes_no_judge"
    keeps_parts = True
    layout = "dpg"

    def rows(self) -> Rows:
        """One prompt for all rows of an item."""
        items: dict[str, list[tuple[str, dict[str, str]]]] = {}
        path = one_file(self.data, self.files)
        for index, (where, row) in enumerate(table_rows(path, COLUMNS)):
            if index or self.mode == "fixed":
                items.setdefault(row["item_id"] or "", []).append((where, row))
        for item, rows in items.items():
            yield rows[0][0], lambda item=item, rows=rows: self._prompt(item, rows)  # type: ignore[misc]

    def _prompt(self, item: str, rows: Sequence[tuple[str, dict[str, str]]]) -> Prompt:
        questions = [_question(row) for _, row in rows]
        known = {q.number for q in questions}
        for q in questions:
            for parent in q.parents:
                if parent not in known:
                    raise RowError(f"question {q.number} depends on {parent}, which is not there")
        if len(known) < len(questions):
            raise RowError("a proposition_id occurs twice")
        facts = {"questions": questions}
        text = cell(rows[0][1], "text")
        return Prompt(id=safe_id(item), item=item, text=text, task="all", facts=facts)

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """Mean score of each picture's questions; ``parts`` are answers before zeroing."""
        asked = [self.prompt_of(r.key).facts["questions"] for r in requests]
        texts = [[q.text for q in questions] for questions in asked]
        answers, notes = ask_questions(self, media, texts)
        values, raw = [], []
        for questions, said in zip(asked, answers, strict=True):
            found = {q.number: float(a > 0.5) for q, a in zip(questions, said, strict=True)}
            raw.append({f"q{number}": value for number, value in found.items()})
            broken = any(a != a for a in said)
            parents = {q.number: q.parents for q in questions}
            scores = cascade(found, parents, in_file_order=self.mode == "compat")
            values.append(float("nan") if broken else sum(scores.values()) / len(scores))
        return _score(values, raw, notes, self.identity)

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """The benchmark's score and its categories of both levels, all times 100."""
        prompts: dict[str, list[Row]] = {}
        for row in rows:
            if row.valid:
                prompts.setdefault(self.prompt_of(row.key).id, []).append(row)
        means = [mean(r.value or 0.0 for r in group) or 0.0 for group in prompts.values()]
        broad: dict[str, list[float]] = {}
        detailed: dict[str, list[float]] = {}
        for group in prompts.values():
            last = sorted(group, key=lambda r: r.sample)
            for row in last[-1:] if self.mode == "compat" else last:
                for category, value in self._by_category(row):
                    detailed.setdefault(category, []).append(value)
                    broad.setdefault(category.split("-")[0].strip(), []).append(value)
        found = {"DPG-Bench": mean(means)} | {n: mean(v) for n, v in broad.items()}
        found |= {f"detail: {n}": mean(v) for n, v in sorted(detailed.items())}
        return {n: None if v is None else 100 * v for n, v in found.items()}

    def _by_category(self, row: Row) -> Iterator[tuple[str, float]]:
        questions: Sequence[Question] = self.prompt_of(row.key).facts["questions"]
        answers = {q.number: row.parts.get(f"q{q.number}") or 0.0 for q in questions}
        if self.mode == "fixed":
            answers = cascade(answers, {q.number: q.parents for q in questions}, False)
        yield from ((q.category, answers[q.number]) for q in questions)


def _question(row: Mapping[str, Any]) -> Question:
    try:
        number = int(row["proposition_id"])
        parents = tuple(int(p) for p in str(row["dependency"]).split(","))
    except (ValueError, TypeError) as error:
        raise RowError(f"proposition_id and dependency must be whole numbers ({error})") from error
    category = cell(dict(row), "tuple").split("(")[0].strip()
    text = cell(dict(row), "question_natural_language")
    return Question(number, tuple(p for p in parents if p != 0), category, text)


def _score(
    values: Sequence[float], raw: Sequence[Mapping[str, float]], notes: Sequence[str], identity: str
) -> Score:
    names = list(dict.fromkeys(n for row in raw for n in row))
    parts = {n: torch.tensor([row.get(n, torch.nan) for row in raw]) for n in names}
    value = torch.tensor(values, dtype=torch.float32)
    return Score(value, value.isfinite(), parts, tuple(notes) if any(notes) else (), identity)
