"""A picture judged place by place: boxes with scores, and a score of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from mmalign.types import Box, Media, Region, Regions
from vision_rewards.base import NOT_FINITE, checked_call, clean_pixels
from vision_rewards.cards import info_of
from vision_rewards.judge.backend import Reply
from vision_rewards.judge.base import Answer, JudgeReward, Row
from vision_rewards.judge.parsing import (
    UnreadableError,
    exactly,
    json_object,
    number_in,
    text_in,
)
from vision_rewards.judge.templates import quoted

MOST = 64  # regions of one picture; an answer with more is not a judgement
Judged = tuple[float, tuple[Region, ...], str]


class RegionJudge(JudgeReward):
    """The score of the whole picture, from -1 to 1; :meth:`regions` has the boxes as well.

    ``parts`` holds ``regions``, how many boxes were named, and ``lowest``, the worst of their
    scores (NaN without any); the notes hold the reasons. Both methods ask: give the judge a
    ``cache`` where both are used. See :class:`~vision_rewards.judge.base.JudgeReward`.
    """

    info = info_of("region_judge")
    template_name = "regions"

    def judge(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Row]:
        """One question for each picture."""
        return [_row(answer) for answer in self._answers(pictures, prompts)]

    def regions(self, media: Media, prompts: Sequence[str]) -> Regions:
        """Boxes and scores of a batch; what cannot be read, or is not finite, is unscored.

        Raises:
            ValueError: a call that could never work, as in :meth:`score`.
        """
        checked_call(self.info, media, prompts, None)
        pixels, finite = clean_pixels(media)
        self.placed(media.data.device)
        pictures = [self.fitted(p) for p in Media(pixels.detach()).to_pil()]
        with torch.no_grad(), torch.autocast(media.data.device.type, enabled=False):
            answers = self._answers(pictures, prompts)
        read = [a.value if ok else None for a, ok in zip(answers, finite.tolist(), strict=True)]
        reasons = [
            a.reason if ok else NOT_FINITE for a, ok in zip(answers, finite.tolist(), strict=True)
        ]
        overall = torch.tensor([math.nan if found is None else found[0] for found in read])
        return Regions(
            tuple(() if found is None else found[1] for found in read),
            overall.to(media.data.device),
            torch.isfinite(overall).to(media.data.device),
            tuple(r if found is None else found[2] for r, found in zip(reasons, read, strict=True)),
        )

    def _answers(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[Answer[Judged]]:
        queries = [
            self.query(self.template.fill(prompt=quoted(prompt)), [picture])
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return self.ask(queries, _parse)


def _parse(reply: Reply) -> Judged:
    record = exactly(json_object(reply.text), ("regions", "reason", "score"), "the answer")
    rows = record["regions"]
    if not isinstance(rows, list) or len(rows) > MOST:
        raise UnreadableError(f"regions must be a list of at most {MOST}, got {str(rows)[:80]!r}")
    found = tuple(_region(row, f"region {i}") for i, row in enumerate(rows, 1))
    return number_in(record["score"], -1, 1, "score"), found, text_in(record["reason"], "reason")


def _region(row: Any, what: str) -> Region:
    record = exactly(row, ("label", "box", "reason", "score"), what)
    corners = record["box"]
    if not isinstance(corners, list) or len(corners) != 4:
        raise UnreadableError(f"the box of {what} must be four numbers, got {corners!r}")
    left, top, right, bottom = (number_in(c, 0, 1, f"the box of {what}") for c in corners)
    box: Box = (left, top, right, bottom)
    if not (left < right and top < bottom):
        raise UnreadableError(f"the box of {what} must have left < right and top < bottom")
    note = f"{text_in(record['label'], 'label')}: {text_in(record['reason'], 'reason')}"
    return Region(box, number_in(record["score"], -1, 1, f"the score of {what}"), note)


def _row(answer: Answer[Judged]) -> Row:
    if answer.value is None:
        return Row(note=answer.reason)
    overall, found, reason = answer.value
    lowest = min((r.score for r in found), default=math.nan)
    return Row(overall, {"regions": float(len(found)), "lowest": lowest}, reason)
