"""A picture judged by a rubric: a reason and a score for each criterion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vision_rewards.cards import info_of
from vision_rewards.judge.backend import Reply
from vision_rewards.judge.base import Answer, JudgeReward, Row
from vision_rewards.judge.parsing import UnreadableError, json_object
from vision_rewards.judge.rubric import Rubric, load_rubric
from vision_rewards.judge.templates import quoted

Scores = dict[str, tuple[float | None, str]]


class RubricJudge(JudgeReward):
    """Weighted mean of a rubric's criteria, in [0, 1].

    ``parts`` holds each criterion's score on its own scale (NaN where it does not apply), the
    notes hold the reasons.

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
        """One question for each picture."""
        rubric, form = self.rubric.text(), self.rubric.form()
        queries = [
            self.query(
                self.template.fill(prompt=quoted(prompt), rubric=rubric, form=form), [picture]
            )
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return [self._row(answer) for answer in self.ask(queries, self._parse)]

    def _parse(self, reply: Reply) -> Scores:
        read = self.rubric.read(json_object(reply.text))
        if all(score is None for score, _ in read.values()):
            raise UnreadableError("no criterion has a score")
        return read

    def _row(self, answer: Answer[Scores]) -> Row:
        if answer.value is None:
            return Row(note=answer.reason)
        scores = {name: score for name, (score, _) in answer.value.items()}
        parts = {n: math.nan if s is None else s for n, s in scores.items()}
        reasons = [f"{name}: {reason}" for name, (_, reason) in answer.value.items() if reason]
        return Row(self.rubric.total(scores), parts, "; ".join(reasons))
