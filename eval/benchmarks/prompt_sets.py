"""Prompts scored by any reward: PartiPrompts, DrawBench, Pick-a-Pic, GenAI-Bench, text rendering.

Each is a list of prompts with (some) categories; the numbers are the mean over pictures and the
mean of each category. Both modes are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.benchmarks.base import (
    DataError,
    Numbers,
    Prompt,
    PromptBenchmark,
    RowError,
    Rows,
    grouped,
    mean,
    plain_means,
    safe_id,
)
from eval.benchmarks.tables import cell, json_of, lines_of, one_file, table_rows
from eval.result import Row
from vision_rewards.ocr import plain, quoted_text


class LineBenchmark(PromptBenchmark):
    """Base of sets with one prompt in a line and no categories."""

    files = "test.txt"

    def rows(self) -> Rows:
        """One prompt for each line that is not empty."""
        for index, (where, text) in enumerate(lines_of(one_file(self.data, self.files))):
            yield where, lambda index=index, text=text: self.prompt(index, text)  # type: ignore[misc]

    def prompt(self, index: int, text: str) -> Prompt:
        """The prompt of a line."""
        return Prompt(id=f"{index:05d}", text=text, task="all")


class PartiPrompts(PromptBenchmark):
    """P2 (Yu et al. 2022, 2206.10789): 1,632 prompts in 12 categories and 11 challenges.

    ``data`` is ``PartiPrompts.tsv``. The paper has people compare; any reward can be the scorer.

    Args:
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`.
    """

    name = "parti"
    version = "1"
    files = "PartiPrompts.tsv"
    reward_spec = "pickscore"

    def rows(self) -> Rows:
        """One prompt for each row."""
        path = one_file(self.data, self.files)
        rows = table_rows(path, ("Prompt", "Category", "Challenge"), tabs=True)
        for index, (where, row) in enumerate(rows):
            yield where, lambda index=index, row=row: _parti(index, row)  # type: ignore[misc]

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """Means: all, categories, challenges."""
        challenges = grouped(rows, lambda r: self.prompt_of(r.key).facts["challenge"])
        found = {f"challenge: {name}": mean(values) for name, values in challenges.items()}
        return {**plain_means(rows), **found}


def _parti(index: int, row: dict[str, str]) -> Prompt:
    facts = {"challenge": cell(row, "Challenge")}
    category = cell(row, "Category")
    return Prompt(id=f"{index:05d}", text=cell(row, "Prompt"), task=category, facts=facts)


class DrawBench(PromptBenchmark):
    """DrawBench (Saharia et al. 2022, 2205.11487): 200 prompts in 11 categories.

    ``data`` is a text file with one prompt a line, or a CSV file with the columns ``Prompts`` and
    ``Category``. Reinforcement learning papers score its pictures by several rewards that were not
    trained on.

    Args:
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`.
    """

    name = "drawbench"
    version = "1"
    files = "test.txt (one prompt a line) or drawbench.csv (Prompts, Category)"
    reward_spec = "pickscore"

    def rows(self) -> Rows:
        """One prompt for each line or row."""
        path = one_file(self.data, "drawbench.csv", "test.txt")
        if path.suffix == ".csv":
            for index, (where, row) in enumerate(table_rows(path, ("Prompts", "Category"))):
                yield where, lambda i=index, r=row: _drawn(i, r)  # type: ignore[misc]
        else:
            for index, (where, text) in enumerate(lines_of(path)):
                yield where, lambda i=index, t=text: _draw(i, t, "all")  # type: ignore[misc]


def _drawn(index: int, row: dict[str, str]) -> Prompt:
    return _draw(index, cell(row, "Prompts"), cell(row, "Category"))


def _draw(index: int, text: str, category: str) -> Prompt:
    return Prompt(id=f"{index:05d}", text=text, task=category)


class PickScorePrompts(LineBenchmark):
    """Prompts of Pick-a-Pic's users as Flow-GRPO splits them (2505.05470): 2,048 for testing.

    ``data`` is ``test.txt``; the number is the mean PickScore.

    Args:
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`.
    """

    name = "pickscore"
    version = "1"
    reward_spec = "pickscore"


class OcrBenchmark(LineBenchmark):
    """Text rendering as Flow-GRPO measures it (2505.05470): the quoted words have to be readable.

    ``data`` is ``test.txt``; ``overall`` is the mean of ``1 - min(d, n) / n`` with the edit
    distance ``d`` to the ``n`` letters asked for, 0 where they occur in what was read.

    Args:
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`.
    """

    name = "ocr"
    version = "1"
    reward_spec = "ocr"
    keeps_parts = True

    def prompt(self, index: int, text: str) -> Prompt:
        """The prompt of a line, which must quote something."""
        if not plain(quoted_text(text) or ""):
            raise RowError("it quotes no text that could be rendered")
        return Prompt(id=f"{index:05d}", text=text, task="all")

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """The mean reward and the share of pictures with exactly these words."""
        exact = [r.parts["exact"] for r in rows if r.valid and r.parts.get("exact") is not None]
        return {
            "overall": plain_means(rows)["overall"],
            "exact": mean(v for v in exact if v is not None),
        }


class GenAIBenchPrompts(PromptBenchmark):
    """GenAI-Bench (Li et al. 2024, 2406.13743): compositional prompts with skills, by VQAScore.

    ``data`` is the folder with ``genai_image.json`` (id to ``{"prompt": ...}``) and, for numbers by
    skill, ``genai_skills.json`` (skill to ids). A prompt has several skills, so that the numbers of
    skills overlap; ``overall`` is the mean over pictures.

    Args:
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`.
    """

    name = "genai_bench"
    version = "1"
    files = "genai_image.json, with genai_skills.json beside it"
    reward_spec = "vqascore"

    def rows(self) -> Rows:
        """One prompt for each id."""
        path = one_file(self.data, "genai_image.json")
        records = json_of(path)
        if not isinstance(records, Mapping):
            raise DataError(f"{path} must hold an object of prompts by id")
        skills = self._skills(path.with_name("genai_skills.json"))
        for key, record in records.items():
            yield f"{path.name}, id {key!r}", lambda k=key, r=record: _genai(k, r, skills)  # type: ignore[misc]

    def _skills(self, path: Any) -> dict[str, list[str]]:
        if not path.is_file():
            return {}
        told: dict[str, list[str]] = {}
        for skill, ids in json_of(path).items():
            for one in ids:
                told.setdefault(str(one), []).append(skill)
        return told

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """Means: all, and of the pictures of each skill."""
        found: dict[str, list[float]] = {}
        for row in rows:
            for skill in self.prompt_of(row.key).facts["skills"] if row.valid else ():
                found.setdefault(skill, []).append(row.value or 0.0)
        skills = {skill: mean(values) for skill, values in sorted(found.items())}
        return {"overall": plain_means(rows)["overall"], **skills}


def _genai(key: str, record: Any, skills: Mapping[str, list[str]]) -> Prompt:
    text = record.get("prompt") if isinstance(record, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise RowError("no text 'prompt'")
    facts = {"skills": skills.get(key, [])}
    return Prompt(id=safe_id(key), item=key, text=text.strip(), task="all", facts=facts)
