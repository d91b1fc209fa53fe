"""UniGenBench (Wang et al. 2025, 2510.18701): a judge checks one to ten points of each picture.

With an answer in {0, 1} to each of the test points of a picture, over all pictures::

    dimension         share of points of that name that are met
    primary dimension the same over all points whose name is equal before the first "-"
    micro             share of all points that are met
    macro             mean of the primary dimensions

The published script prints the dimensions only; ``micro`` and ``macro`` are named here so that
they are not taken for each other. Pictures whose answer cannot be read are left out, as there, and
counted as unscored. Both modes are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eval.benchmarks.base import Numbers, Prompt, PromptBenchmark, RowError, Rows, mean, safe_id
from eval.benchmarks.questions import ask_questions
from eval.benchmarks.tables import cell, header_of, one_file, parsed, table_rows
from eval.benchmarks.unigenbench_answers import Answers, read_answers
from eval.result import Row
from mmalign.protocols import Request, RewardModel
from mmalign.registry import unknown
from mmalign.types import Media, Score
from vision_rewards.judge.checklist import ChecklistJudge
from vision_rewards.judge.pointwise import RubricJudge
from vision_rewards.judge.rubric import Criterion, Rubric

SPLITS = ("en", "en_long", "zh", "zh_long")
# Keys of the JSON in the last column: test points, their descriptions, the theme.
KEYS = {
    "en": ("Testpoints", "Testpoint Description", "Primary Categories"),
    "zh": ("考点", "考点对应描述", "一级垂类"),
}


class UniGenBench(PromptBenchmark):
    """600 prompts, four pictures each; ``data`` is ``test_prompts_en.csv`` or a folder with it.

    Three kinds of rewards can grade. ``rubric_judge`` (any model; the default) takes each test
    point as a criterion of 0 or 1. ``checklist_judge`` is asked for, and answers in, the form of
    the published judges. Any other reward that gives a probability in [0, 1] (``yes_no_judge``,
    ``vqascore``) is asked about each point by itself, and above one half is met.

    The published judges (Gemini 2.5 Pro, or the authors' Qwen models) are asked in other words, and
    numbers of another judge are not comparable with theirs.

    Args:
        split: ``en``, ``en_long``, ``zh`` or ``zh_long``: the file in a folder. The language of a
            single file is that of its columns.
        answers: the results file (CSV) that the authors' scripts write: its answers are read and
            nothing is asked; the pictures are those it was made from.
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`.

    Raises:
        ValueError: ``answers`` and a reward, or a reward that gives no probability.
    """

    name = "unigenbench"
    version = "1"
    files = "test_prompts_en.csv"
    samples = 4
    reward_spec = "rubric_judge"
    keeps_parts = True
    layout = "unigenbench"

    def __init__(
        self,
        data: str | Path | None = None,
        *,
        split: str = "en",
        answers: str | Path | None = None,
        **common: Any,
    ) -> None:
        if split not in SPLITS:
            raise unknown("split of unigenbench", split, SPLITS)
        if answers is not None and common.get("reward") is not None:
            raise ValueError("answers are there already: give either answers or reward")
        self.split = split
        self.files = f"test_prompts_{split}.csv"
        super().__init__(data, **common)
        self.answers: Answers | None = None if answers is None else read_answers(Path(answers))

    def settings(self) -> dict[str, Any]:
        """The language of the prompts."""
        return {} if self.language == "en" else {"language": self.language}

    @cached_property
    def _file(self) -> Path:
        return one_file(self.data, self.files, f"data/{self.files}")

    @cached_property
    def language(self) -> str:
        """``zh`` where the file has Chinese columns, else ``en``."""
        return "zh" if "prompt_zh" in header_of(self._file) else "en"

    def rows(self) -> Rows:
        """One prompt for each row."""
        language = self.language
        columns = ("index", f"prompt_{language}", f"sub_dims_{language}")
        for where, row in table_rows(self._file, columns):
            yield where, lambda row=row: _prompt(row, language)  # type: ignore[misc]

    @cached_property
    def reward(self) -> RewardModel:
        """The judge. Raises ``ValueError`` for a reward that cannot say whether a point is met."""
        found = super().reward
        info = found.info
        if not _takes_all_points(found) and (info.range, info.scope) != ((0.0, 1.0), "pointwise"):
            raise ValueError(
                f"unigenbench: reward {info.name!r} gives no probability that a test point is met; "
                "use rubric_judge, checklist_judge, or a pointwise reward in [0, 1] such as "
                "yes_no_judge (-o reward=...)"
            )
        return found

    @property
    def identity(self) -> str:
        """What judges the pictures."""
        return self.reward.identity if self.answers is None else self.answers.identity

    def context(self, prompt: Prompt) -> Mapping[str, Any]:
        """The test points, as a rubric and as a list."""
        points = prompt.facts["points"]
        criteria = tuple(
            Criterion(name=f"point_{k}", scale=(0.0, 1.0), description=f"{name}: {text}")
            for k, (name, text) in enumerate(points)
        )
        rubric = Rubric(name="unigenbench", criteria=criteria)
        return {"rubric": rubric, "checklist": points, "language": self.language}

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """The share of points that are met; the parts ``point_0``, ... are the verdicts."""
        if self.answers is not None:
            prompts = [self.prompt_of(r.key) for r in requests]
            points = [[name for name, _ in p.facts["points"]] for p in prompts]
            return self.answers.score(requests, points)
        if _takes_all_points(self.reward):
            return super().judge(media, requests)
        return self._one_by_one(media, requests)

    def _one_by_one(self, media: Media, requests: Sequence[Request]) -> Score:
        asked = [self.prompt_of(r.key).facts["points"] for r in requests]
        found, notes = ask_questions(self, media, [[t for _, t in points] for points in asked])
        whole = [not any(map(math.isnan, row)) for row in found]
        met = [[float(v > 0.5) for v in row] for row in found]
        value = [sum(r) / len(r) if ok else math.nan for r, ok in zip(met, whole, strict=True)]
        parts = {
            f"point_{k}": torch.tensor(
                [r[k] if ok and k < len(r) else math.nan for r, ok in zip(met, whole, strict=True)]
            )
            for k in range(max(map(len, met), default=0))
        }
        told = tuple(notes) if any(notes) else ()
        return Score(torch.tensor(value), torch.tensor(whole), parts, told, self.identity)

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """Micro and macro means, primary dimensions, dimensions."""
        fine: dict[str, list[float]] = {}
        for row in rows:
            points = self.prompt_of(row.key).facts["points"] if row.valid else ()
            for k, (name, _) in enumerate(points):
                met = row.parts.get(f"point_{k}")
                fine.setdefault(name, []).append(float(met == 1))
        broad: dict[str, list[float]] = {}
        for name, met_ones in fine.items():
            broad.setdefault(name.split("-", 1)[0].strip(), []).extend(met_ones)
        primary = {name: mean(values) for name, values in broad.items()}
        return {
            "micro": mean(v for values in fine.values() for v in values),
            "macro": mean(v for v in primary.values() if v is not None),
            **primary,
            **{f"point: {name}": mean(values) for name, values in sorted(fine.items())},
        }


def _takes_all_points(reward: RewardModel) -> bool:
    return isinstance(getattr(reward, "reward", reward), (RubricJudge, ChecklistJudge))


def _prompt(row: dict[str, str], language: str) -> Prompt:
    points_key, said_key, theme_key = KEYS[language]
    column = f"sub_dims_{language}"
    index, text = cell(row, "index"), cell(row, f"prompt_{language}")
    record = parsed(cell(row, column))
    names, said = record.get(points_key), record.get(said_key)
    if not isinstance(names, list) or not isinstance(said, list) or not names:
        raise RowError(f"{column} has no lists {points_key!r} and {said_key!r}")
    if len(names) != len(said):
        raise RowError(f"{len(names)} test points, {len(said)} descriptions")
    points = [(str(n), str(t)) for n, t in zip(names, said, strict=True)]
    task = str(record.get(theme_key) or "all")
    return Prompt(id=safe_id(index), item=index, text=text, task=task, facts={"points": points})
