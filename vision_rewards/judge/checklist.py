"""Test points of a picture, each met or not: the answers that UniGenBench's own judges give.

UniGenBench (Wang et al. 2025, arXiv:2510.18701) grades with Gemini 2.5 Pro or with a model of its
own (``CodeGoat24/UniGenBench-EvalModel-qwen-72b-v1``). Both are asked once for each picture, and
answer in English or Chinese with two lists in the order of the ``n`` test points::

    <analysis>["why", ...]</analysis>
    <score>[s_1, ..., s_n]</score>        s_k in {0, 1}

The value of a picture is the mean of ``s``. The published scripts ask again, without end, where a
list cannot be read or has another length; here an answer is asked for again ``reasks`` times and
is then unscored. They also want the reasons to be a list that can be read; here only the scores
decide, and reasons that are no list (stray quotes) are kept as they are.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.registry import unknown
from vision_rewards.cards import info_of
from vision_rewards.judge.backend import Reply
from vision_rewards.judge.base import Answer, JudgeReward, Row
from vision_rewards.judge.parsing import UnreadableError, without_thoughts
from vision_rewards.judge.templates import load_template, quoted

Verdicts = tuple[list[int], list[str]]
LANGUAGES = {"en": "checklist", "zh": "checklist_zh"}
ITSELF = {"en": "the whole text", "zh": "整段文本"}
_ECHO = re.compile(r"<(prompt|checkpoint)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_BRACKETS = str.maketrans("【】、", "[],")  # full-width signs that NFKC leaves alone


class ChecklistJudge(JudgeReward):
    """Share of the test points that a picture meets, in [0, 1].

    ``context["checklist"]`` holds ``(name, description)`` of every test point, and
    ``context["language"]`` is ``en`` (default) or ``zh``; without a checklist the text as a whole
    is the only point. ``parts``: ``point_0``, ``point_1``, ... are the verdicts. The notes hold
    the reasons.

    Args:
        definitions: a JSON file that says what the names of test points mean in general; those of
            the points asked about are part of the question.
        judge: see :class:`~vision_rewards.judge.base.JudgeReward`. A ``template`` of your own (such
            as the published wording) asks in both languages; its places are ``prompt`` (between
            tags), ``text`` (the bare prompt), ``names`` (a list), ``points``, ``definitions`` and
            ``count``.

    Raises:
        ValueError: ``definitions`` is no JSON object of texts.
    """

    info = info_of("checklist_judge")
    template_name = "checklist"
    default_max_tokens = 2048

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        definitions: str | Path | None = None,
        template: str | Path | None = None,
        **judge: Any,
    ) -> None:
        self.definitions = {} if definitions is None else _read_definitions(Path(definitions))
        super().__init__(checkpoint, template=template, **judge)
        own = {language: load_template(name) for language, name in LANGUAGES.items()}
        self.templates = own if template is None else dict.fromkeys(LANGUAGES, self.template)

    def settings(self) -> dict[str, Any]:
        """Those of every judge, the words in both languages, and the definitions."""
        words = [t.fingerprint for t in self.templates.values()]
        return {**super().settings(), "checklist": [words, sorted(self.definitions.items())]}

    def judge(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Row]:
        """One question for each picture, about all of its points."""
        points = [_points(p, facts) for p, facts in zip(prompts, context, strict=True)]
        rows: list[Row] = [Row()] * len(pictures)
        # The parser has to know how many verdicts there must be: ask length by length.
        for count in sorted({len(p) for p in points}):
            places = [k for k, p in enumerate(points) if len(p) == count]
            asked = [
                self.query(self._words(prompts[k], points[k], context[k]), [pictures[k]])
                for k in places
            ]
            answers = self.ask(asked, partial(read_verdicts, count=count))
            for k, answer in zip(places, answers, strict=True):
                rows[k] = _row(answer, points[k])
        return rows

    def _words(
        self, prompt: str, points: Sequence[tuple[str, str]], facts: Mapping[str, Any]
    ) -> str:
        names = [name for name, _ in points]
        known = [f"{n}: {self.definitions[n]}" for n in names if n in self.definitions]
        return self.templates[_language(facts)].fill(
            prompt=quoted(prompt),
            text=prompt,
            names=str(names),
            points="\n".join(f"{k}. {n}: {t}" for k, (n, t) in enumerate(points, 1)),
            definitions="\n".join(dict.fromkeys(known)),
            count=str(len(points)),
        )


def read_verdicts(reply: Reply, count: int) -> Verdicts:
    """The ``count`` verdicts of an answer and their reasons (see the module).

    Full-width brackets, commas and digits are read as what they stand for.

    Raises:
        UnreadableError: no list of scores, several that differ, another length, or a score that
            is neither 0 nor 1.
    """
    # Models repeat the prompt, which may hold such tags of its own.
    text = _ECHO.sub("", without_thoughts(reply.text))
    said = {" ".join(s.split()) for s in _inside(text, "score")}
    if len(said) != 1:
        wrong = "it has no <score>[...]</score>" if not said else "its <score> is given twice"
        raise UnreadableError(wrong)
    scores = _list(unicodedata.normalize("NFKC", said.pop()).translate(_BRACKETS))
    if scores is None:
        raise UnreadableError("its <score> is no list like [1, 0]")
    if len(scores) != count:
        raise UnreadableError(f"its <score> has {len(scores)} entries for {count} test points")
    for score in scores:
        if isinstance(score, bool) or score not in (0, 1):
            raise UnreadableError(f"a score must be 0 or 1, got {score!r}")
    return [int(s) for s in scores], _reasons(text, count)


def _reasons(text: str, count: int) -> list[str]:
    found = _inside(text, "analysis")
    if not found:
        return []
    listed = _list(found[-1])
    if listed is None:
        return [found[-1]]
    if len(listed) != count:
        raise UnreadableError(f"its <analysis> has {len(listed)} entries for {count} test points")
    return [str(reason) for reason in listed]


def _inside(text: str, tag: str) -> list[str]:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL | re.IGNORECASE)
    return [inner.strip() for inner in found]


def _list(text: str) -> list[Any] | None:
    """A list as Python or JSON writes it; ``None`` for anything else."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _points(prompt: str, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = facts.get("checklist")
    if told is None:
        return [(ITSELF[_language(facts)], prompt)]
    points = [(str(name), str(text)) for name, text in told]
    if not points:
        raise ValueError("context['checklist'] is empty; leave it out, or name a test point")
    return points


def _language(facts: Mapping[str, Any]) -> str:
    language = str(facts.get("language", "en"))
    if language not in LANGUAGES:
        raise unknown("language of a checklist", language, LANGUAGES)
    return language


def _row(answer: Answer[Verdicts], points: Sequence[tuple[str, str]]) -> Row:
    if answer.value is None:
        return Row(note=answer.reason)
    scores, reasons = answer.value
    parts = {f"point_{k}": float(score) for k, score in enumerate(scores)}
    named = [f"[{'x' if s else ' '}] {n}" for s, (n, _) in zip(scores, points, strict=True)]
    if len(reasons) == len(named):
        named = [f"{n}: {why}" for n, why in zip(named, reasons, strict=True)]
        reasons = []
    return Row(sum(scores) / len(scores), parts, "; ".join([*named, *reasons]))


def _read_definitions(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"definitions {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(f"definitions {path} must be a JSON object of names and texts")
    return found
