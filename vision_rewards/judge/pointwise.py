"""A picture judged by a rubric: a reason and a score for each criterion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vision_rewards.cards import info_of
from vision_rewards.judge.backend import Query, Reply
from vision_rewards.judge.base import Answer, JudgeReward, Row
from vision_rewards.judge.parsing import UnreadableError, json_object
from vision_rewards.judge.rubric import Rubric, load_rubric
from vision_rewards.judge.templates import quoted

Scores = dict[str, tuple[float | None, str]]


class RubricJudge(JudgeReward):
    """Weighted mean of a rubric's criteria, in [0, 1].

    ``parts`` holds each criterion's score on its own scale (NaN where it does not apply), the
    notes hold the reasons.  ``context["rubric"]`` may hold another rubric for a picture; parts of
    rubrics that a picture was not judged by are NaN.

    Args:
        rubric: a :class:`~vision_rewards.judge.rubric.Rubric`, a shipped one's name, or a YAML
            file.
        judge: see :class:`~vision_rewards.judge.base.JudgeReward`.
    """

    info = info_of("rubric_judge")
    template_name = "rubric"

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        rubric: Rubric | str | Path = "default",
        **judge: Any,
    ) -> None:
        self.rubric = load_rubric(rubric)
        super().__init__(checkpoint, **judge)

    def settings(self) -> dict[str, Any]:
        """Those of every judge, and the rubric."""
        return {**super().settings(), "rubric": repr(self.rubric)}

    def judge(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Row]:
        """One question for each picture, by the rubric of its context where that holds one."""
        rubrics = [load_rubric(facts.get("rubric", self.rubric)) for facts in context]
        groups: dict[str, list[int]] = {}
        for k, rubric in enumerate(rubrics):
            groups.setdefault(repr(rubric), []).append(k)
        found: dict[int, Row] = {}
        for rows in groups.values():
            rubric = rubrics[rows[0]]
            asked = [self._question(rubric, prompts[k], pictures[k]) for k in rows]
            answers = self.ask(asked, lambda reply, rubric=rubric: _parse(reply, rubric))  # type: ignore[misc]
            found |= {k: _row(a, rubric) for k, a in zip(rows, answers, strict=True)}
        return [found[k] for k in range(len(pictures))]

    def _question(self, rubric: Rubric, prompt: str, picture: Image.Image) -> Query:
        words = {"prompt": quoted(prompt), "rubric": rubric.text(), "form": rubric.form()}
        return self.query(self.template.fill(**words), [picture])


def _parse(reply: Reply, rubric: Rubric) -> Scores:
    read = rubric.read(json_object(reply.text))
    if all(score is None for score, _ in read.values()):
        raise UnreadableError("no criterion has a score")
    return read


def _row(answer: Answer[Scores], rubric: Rubric) -> Row:
    if answer.value is None:
        return Row(note=answer.reason)
    scores = {name: score for name, (score, _) in answer.value.items()}
    parts = {n: math.nan if s is None else s for n, s in scores.items()}
    reasons = [f"{name}: {reason}" for name, (_, reason) in answer.value.items() if reason]
    return Row(rubric.total(scores), parts, "; ".join(reasons))
