"""A critique first, scores from it, and a better request: RationalRewards.

The judge explains what the prompt asks for, justifies a score for each aspect and says how the
request should be worded next time, so that the text is worth as much as the number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from mmalign.protocols import Review
from mmalign.types import Media, Score
from vision_rewards.base import checked_call, clean_pixels
from vision_rewards.cards import info_of
from vision_rewards.judge.backend import Reply
from vision_rewards.judge.base import Answer, JudgeReward, Row, reading_of
from vision_rewards.judge.parsing import NUMBER, UnreadableError, without_thoughts
from vision_rewards.judge.templates import load_template, quoted

ASPECTS = ("text_faithfulness", "physical_and_visual_quality", "text_rendering")
EDIT_ASPECTS = ("text_faithfulness", "image_faithfulness", *ASPECTS[1:])
LOW, HIGH = 1.0, 4.0
_SCORE = re.compile(rf"##\s*Score\s*:?\s*\**\s*(N/?A|{NUMBER})", re.IGNORECASE)
# A numbered line is a heading only where its justification follows, which may hold a list itself.
_HEADING = re.compile(
    r"^[ \t]*#*[ \t]*\**\d+[.)][ \t]*(.+)\n(?=\s*##\s*Justif)", re.I | re.MULTILINE
)
_WHY = re.compile(r"##\s*Justification\s*:?(.*?)(?=\n\s*##|\Z)", re.DOTALL | re.IGNORECASE)
_END = re.compile(r"^#+\s*(Summary|Refined)[^\n:]*:?(.*?)(?=^#|\Z)", re.S | re.I | re.MULTILINE)


@dataclass(frozen=True)
class Critique:
    """What a judge said about a picture.

    Attributes:
        scores: of each aspect, in [1, 4]; ``None`` where it does not apply.
        justifications: why, for each aspect.
        summary: of the whole.
        refined_request: a wording of the prompt that should give a better picture; empty where
            none was given.
        text: the raw answer.
    """

    scores: Mapping[str, float | None]
    justifications: Mapping[str, str]
    summary: str
    refined_request: str
    text: str

    @property
    def value(self) -> float:
        """``(mean - 1) / 3`` of the aspects that apply, in [0, 1]."""
        given = [s for s in self.scores.values() if s is not None]
        return (sum(given) / len(given) - LOW) / (HIGH - LOW)


class CritiqueJudge(JudgeReward):
    """Aspects from 1 to 4 after a critique; the value is their mean as a share, in [0, 1].

    RationalRewards, Wang et al. 2026, arXiv:2604.11626.

    A sample with ``context["source"]`` is judged as an edit of that picture, with the further
    aspect ``image_faithfulness``.  The notes hold the summary and the refined request;
    :meth:`critiques` returns everything that was said.
    """

    info = info_of("critique_judge")
    template_name = "critique"
    default_max_tokens = 3072

    def settings(self) -> dict[str, Any]:
        """Those of every judge, and the template for edits."""
        return {**super().settings(), "edit": load_template("critique_edit").fingerprint}

    def critiques(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Critique | None]:
        """What was said about each picture; ``None`` where nothing could be read.

        Raises:
            ValueError: a call that could never work.
        """
        checked_call(self.info, media, prompts, context)
        pictures = [self.fitted(p) for p in media.to_pil()]
        return [a.value for a in self._ask(pictures, prompts, context or [{}] * len(media))]

    def review(self, media: Media, prompts: Sequence[str]) -> tuple[Score, Sequence[Review | None]]:
        """Scores, critiques and refined requests, of one answer for each picture."""
        checked_call(self.info, media, prompts, None)
        pixels, finite = clean_pixels(media)
        pictures = [self.fitted(p) for p in Media(pixels).to_pil()]
        answers = self._ask(pictures, prompts, [{}] * len(media))
        score = self._record(reading_of([_row(a) for a in answers]), finite, media.data.device)
        return score, [_review(answer.value) for answer in answers]

    def judge(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Row]:
        """One question for each picture."""
        return [_row(answer) for answer in self._ask(pictures, prompts, context)]

    def _ask(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Answer[Critique]]:
        edit, edits = load_template("critique_edit"), []
        queries = []
        for picture, prompt, facts in zip(pictures, prompts, context, strict=True):
            source = facts.get("source")
            edits.append(source is not None)
            shown = [self.fitted(source, "context['source']")] if edits[-1] else []
            template = edit if edits[-1] else self.template
            queries.append(self.query(template.fill(prompt=quoted(prompt)), [*shown, picture]))
        answers: list[Answer[Critique]] = [Answer(None)] * len(queries)
        for kind, aspects in ((False, ASPECTS), (True, EDIT_ASPECTS)):
            rows = [i for i, e in enumerate(edits) if e is kind]
            parsed = self.ask([queries[i] for i in rows], partial(read_critique, aspects=aspects))
            for i, answer in zip(rows, parsed, strict=True):
                answers[i] = answer
        return answers


def _review(said: Critique | None) -> Review | None:
    if said is None:
        return None
    refined = " ".join(said.refined_request.split())
    return Review(said.scores, said.summary, refined)


def _row(answer: Answer[Critique]) -> Row:
    if answer.value is None:
        return Row(note=answer.reason)
    said = answer.value
    parts = {n: math.nan if s is None else s for n, s in said.scores.items()}
    return Row(said.value, parts, f"{said.summary} Refined request: {said.refined_request}".strip())


def read_critique(reply: Reply, aspects: Sequence[str] = ASPECTS) -> Critique:
    """The critique in an answer.

    Scores beyond the scale are clamped to [1, 4], as published; an aspect without section or with
    ``N/A`` is skipped.

    Raises:
        UnreadableError: no aspect has a score, or one has several.
    """
    text = without_thoughts(reply.text)
    scores: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for aspect, section in _sections(text, aspects).items():
        found = _SCORE.findall(section)
        if len(found) > 1:
            raise UnreadableError(f"{aspect} has {len(found)} scores")
        said = found[0].casefold() if found else "na"
        skipped = said in ("na", "n/a")
        scores[aspect] = None if skipped else min(max(float(said), LOW), HIGH)
        why = _WHY.search(section)
        reasons[aspect] = why[1].strip() if why else ""
    if all(s is None for s in scores.values()):
        raise UnreadableError("no aspect has a '## Score:'")
    ends = {name.casefold(): said.strip() for name, said in _END.findall(text)}
    return Critique(scores, reasons, ends.get("summary", ""), ends.get("refined", ""), reply.text)


def _sections(text: str, aspects: Sequence[str]) -> dict[str, str]:
    """The text under each aspect's numbered heading; empty where it has none."""
    start = re.search(r"^#\s*Detailed Judge?ment", text, re.IGNORECASE | re.MULTILINE)
    body = text[start.end() :] if start else text
    body = re.split(r"^#\s*(?:Summary|Refined)", body, flags=re.IGNORECASE | re.MULTILINE)[0]
    names = {_bare(a): a for a in aspects}
    sections = dict.fromkeys(aspects, "")
    parts = _HEADING.split(body)
    for title, section in zip(parts[1::2], parts[2::2], strict=True):
        aspect = next((a for n, a in names.items() if _bare(title).startswith(n)), None)
        if aspect is not None:
            sections[aspect] += section
    return sections


def _bare(title: str) -> str:
    return re.sub(r"[\W_]+", " ", title).strip().casefold()
