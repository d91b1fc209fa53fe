"""A rubric of the judge's own for each prompt, then a yes or no for each of its criteria."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.runtime.files import atomic_write_json
from vision_rewards.cards import info_of
from vision_rewards.judge.backend import Reply, digest
from vision_rewards.judge.base import Answer, JudgeReward, Row
from vision_rewards.judge.parsing import (
    UnreadableError,
    deduplicated,
    exactly,
    json_object,
    text_in,
)
from vision_rewards.judge.templates import load_template, quoted

FEWEST, MOST = 3, 8  # criteria
Verdicts = list[tuple[bool, str]]


class AutoRubric(JudgeReward):
    """Share of the generated criteria that a picture meets, in [0, 1].

    After Auto-Rubric as Reward (Tian et al. 2026, arXiv:2605.08354): the judge first writes 3 to 8
    criteria for a prompt, seeing no picture, then decides each of them. With ``compare`` the value
    is the paper's binary preference: 1 where the candidate meets more criteria than
    ``context["opponent"]``, 0 where it meets fewer, 0.5 for a tie; the two pictures are judged
    apart, so there is no position to be biased by.

    Rubrics are made once for each prompt. ``parts``: ``met`` and ``criteria``, the counts, and
    with ``compare`` also ``opponent_met``. The notes list every criterion with its verdict.

    Args:
        compare: compare with an opponent.
        examples: text about preferences to go by, for instance a few described pairs.
        rubrics: folder for the generated rubrics, one JSON file for each prompt; files there are
            used as they are, so they can be read, corrected and kept under version control.
        judge: see :class:`~vision_rewards.judge.base.JudgeReward`.
    """

    info = info_of("auto_rubric")
    template_name = "auto_rubric_judge"

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        compare: bool = False,
        examples: str = "",
        rubrics: str | Path | None = None,
        **judge: Any,
    ) -> None:
        self.compare, self.examples = compare, examples
        self.folder = None if rubrics is None else Path(rubrics)
        self.writer = load_template("auto_rubric_write")
        self._rubrics: dict[str, tuple[str, ...]] = {}
        super().__init__(checkpoint, **judge)
        if compare:
            needs = ("prompt", "opponent")
            self.info = replace(self.info, scope="pairwise", needs=needs)

    def settings(self) -> dict[str, Any]:
        """Those of every judge, how rubrics are written, and the folder that may hold others."""
        own = [self.compare, self.examples, self.writer.fingerprint, str(self.folder or "")]
        return {**super().settings(), "auto_rubric": own}

    def judge(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Row]:
        """One question for each prompt that is new, one for each picture to judge."""
        failed = self._prepare(prompts)
        rows = [i for i, prompt in enumerate(prompts) if prompt not in failed]
        shown = [pictures[i] for i in rows]
        if self.compare:
            shown += [self.fitted(context[i]["opponent"], "context['opponent']") for i in rows]
        asked = [prompts[i] for i in rows] * (2 if self.compare else 1)
        answers = self._verdicts(shown, asked)
        judged = [Row(note=failed.get(prompt, "")) for prompt in prompts]
        for k, i in enumerate(rows):
            opponent = answers[k + len(rows)] if self.compare else None
            judged[i] = self._row(self._rubrics[prompts[i]], answers[k], opponent)
        return judged

    def rubric(self, prompt: str) -> tuple[str, ...]:
        """The criteria for ``prompt``, generated where there are none yet.

        Raises:
            ValueError: the judge could not write any; says why.
        """
        failed = self._prepare([prompt])
        if failed:
            raise ValueError(f"no rubric for {prompt!r}: {failed[prompt]}")
        return self._rubrics[prompt]

    def _prepare(self, prompts: Sequence[str]) -> dict[str, str]:
        """Make the rubrics that are missing; the prompts for which that failed, and why."""
        for prompt in set(prompts) - set(self._rubrics):
            stored = self._stored(prompt)
            if stored:
                self._rubrics[prompt] = stored
        missing = [p for p in dict.fromkeys(prompts) if p not in self._rubrics]
        lead = f"{self.examples.strip()}\n" if self.examples.strip() else ""
        queries = [
            self.query(self.writer.fill(prompt=quoted(p), examples=lead), []) for p in missing
        ]
        failed = {}
        for prompt, answer in zip(missing, self.ask(queries, read_criteria), strict=True):
            if answer.value is None:
                failed[prompt] = f"no rubric: {answer.reason}"
            else:
                self._rubrics[prompt] = answer.value
                self._store(prompt, answer.value)
        return failed

    def _path(self, prompt: str) -> Path | None:
        return self.folder and self.folder / f"{digest(prompt, 32)}.json"

    def _stored(self, prompt: str) -> tuple[str, ...]:
        path = self._path(prompt)
        if path is None or not path.is_file():
            return ()
        try:
            criteria = json.loads(path.read_text(encoding="utf-8"))["criteria"]
            return read_criteria(Reply(text=json.dumps({"criteria": criteria})))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"rubric file {path} cannot be used: {error}; remove it") from error

    def _store(self, prompt: str, criteria: Sequence[str]) -> None:
        path = self._path(prompt)
        if path is not None:
            record = {"prompt": prompt, "criteria": list(criteria), "writer": self.backend.identity}
            atomic_write_json(path, record)

    def _verdicts(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[Answer[Verdicts]]:
        answers: list[Answer[Verdicts]] = [Answer(None)] * len(pictures)
        # The parser has to know how many verdicts there must be: ask rubric size by rubric size.
        sizes = [len(self._rubrics[p]) for p in prompts]
        for size in sorted(set(sizes)):
            rows = [i for i, s in enumerate(sizes) if s == size]
            queries = [self._question(pictures[i], prompts[i]) for i in rows]
            read = self.ask(queries, partial(read_verdicts, count=size))
            for i, answer in zip(rows, read, strict=True):
                answers[i] = answer
        return answers

    def _question(self, picture: Image.Image, prompt: str) -> Any:
        numbered = "\n".join(f"{k}. {c}" for k, c in enumerate(self._rubrics[prompt], 1))
        return self.query(self.template.fill(prompt=quoted(prompt), criteria=numbered), [picture])

    def _row(
        self, criteria: Sequence[str], own: Answer[Verdicts], other: Answer[Verdicts] | None
    ) -> Row:
        if own.value is None:
            return Row(note=own.reason)
        met = sum(ok for ok, _ in own.value)
        pairs = zip(criteria, own.value, strict=True)
        note = "; ".join(f"[{'x' if ok else ' '}] {c} ({why})" for c, (ok, why) in pairs)
        parts = {"met": float(met), "criteria": float(len(criteria))}
        if other is None:
            return Row(met / len(criteria), parts, note)
        if other.value is None:
            return Row(note=f"the opponent: {other.reason}")
        against = sum(ok for ok, _ in other.value)
        value = 0.5 + 0.5 * math.copysign(1, met - against) if met != against else 0.5
        return Row(value, {**parts, "opponent_met": float(against)}, note)


def read_criteria(reply: Reply) -> tuple[str, ...]:
    """The different criteria of ``{"criteria": ["...", ...]}``.

    Raises:
        UnreadableError: fewer than 3 that differ, or more than 8.
    """
    record = exactly(json_object(reply.text), ["criteria"], "the answer")
    if not isinstance(record["criteria"], list):
        raise UnreadableError("'criteria' must be a list")
    criteria = deduplicated(text_in(c, "a criterion") for c in record["criteria"])
    if not FEWEST <= len(criteria) <= MOST:
        raise UnreadableError(
            f"it must hold {FEWEST} to {MOST} criteria that differ, it holds {len(criteria)}"
        )
    return tuple(criteria)


def read_verdicts(reply: Reply, count: int) -> Verdicts:
    """``count`` verdicts of ``{"verdicts": [{"criterion": 1, "reason": "...", "met": true}]}``.

    Raises:
        UnreadableError: a criterion without verdict, with two, or one that is not true or false.
    """
    record = exactly(json_object(reply.text), ["verdicts"], "the answer")
    if not isinstance(record["verdicts"], list):
        raise UnreadableError("'verdicts' must be a list")
    read: dict[int, tuple[bool, str]] = {}
    for entry in record["verdicts"]:
        exactly(entry, ["criterion", "reason", "met"], "a verdict")
        number, met = entry["criterion"], entry["met"]
        if type(number) is not int or number in read:
            raise UnreadableError(f"criterion {number!r} is no number, or judged twice")
        if not isinstance(met, bool):
            raise UnreadableError(f"'met' of criterion {number} must be true or false: {met!r}")
        read[number] = met, text_in(entry["reason"], "a reason")
    if sorted(read) != list(range(1, count + 1)):
        raise UnreadableError(f"it must judge criteria 1 to {count}, it judges {sorted(read)}")
    return [read[k] for k in sorted(read)]
