"""EditScore: an edited picture against its source and the instruction, as an average of samples.

Luo et al. 2025, arXiv:2509.23909. Two questions a pass: semantic consistency (SC) sees both
pictures and scores success and overediting, perceptual quality (PQ) sees the edited one and scores
naturalness and artefacts; 0 to 25 each, rescaled to 0 to 10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmalign.registry import unknown
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
from vision_rewards.judge.templates import load_template, quoted

TOP = 25.0
RESCALE = 2.5
REDUCTIONS = ("average_last", "average_first")
Pair = tuple[float, float, str]  # two scores of 0..10 and the reasoning
Pass = tuple[Pair, Pair]  # SC and PQ


class EditScore(JudgeReward):
    """``sqrt(SC * PQ)`` averaged over passes, in [0, 10]; the prompt is the editing instruction.

    ``SC = min(success, overediting)`` and ``PQ = min(naturalness, artefacts)``. A pass of which
    one answer cannot be read is left out; a sample without a single pass is unscored. ``parts``:
    ``prompt_following`` (success), ``consistency`` (SC), ``quality`` (PQ), each a mean over passes,
    and ``passes``, how many there are.

    Args:
        passes: samples, with seeds ``seed + i``; 4 is the published self-ensemble.
        reduction: ``average_last``, the mean of ``sqrt(SC * PQ)``; ``average_first``,
            ``sqrt(mean(prompt_following) * mean(PQ))``.
        temperature: of the samples.
        judge: see :class:`~vision_rewards.judge.base.JudgeReward`.
    """

    info = info_of("edit_score")
    template_name = "edit_score_sc"

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        passes: int = 4,
        reduction: Literal["average_last", "average_first"] = "average_last",
        temperature: float = 0.7,
        **judge: Any,
    ) -> None:
        if passes < 1:
            raise ValueError(f"passes must be 1 or more, got {passes}")
        if reduction not in REDUCTIONS:
            raise unknown("reduction", reduction, REDUCTIONS)
        self.passes, self.reduction = passes, reduction
        self.quality = load_template("edit_score_pq")
        super().__init__(checkpoint, temperature=temperature, **judge)

    def settings(self) -> dict[str, Any]:
        """Those of every judge, the second template, passes and reduction."""
        own = [self.quality.fingerprint, self.passes, self.reduction]
        return {**super().settings(), "edit_score": own}

    def judge(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Row]:
        """Two questions for each picture and pass."""
        queries = []
        for picture, prompt, facts in zip(pictures, prompts, context, strict=True):
            source = self.fitted(facts["source"], "context['source']")
            text = self.template.fill(prompt=quoted(prompt))
            for seed in range(self.seed, self.seed + self.passes):
                queries.append(self.query(text, [source, picture], seed=seed))
                queries.append(self.query(self.quality.fill(), [picture], seed=seed))
        answers, count = self.ask(queries, read_pair), 2 * self.passes
        return [self._row(answers[i : i + count]) for i in range(0, len(answers), count)]

    def _row(self, answers: Sequence[Answer[Pair]]) -> Row:
        both = zip(answers[::2], answers[1::2], strict=True)
        read = [(sc.value, pq.value) for sc, pq in both if sc.value and pq.value]
        if not read:
            return Row(note=next(a.reason for a in answers if a.value is None))
        consistency, quality = ([min(p[k][:2]) for p in read] for k in (0, 1))
        following = [sc[0] for sc, _ in read]
        if self.reduction == "average_last":
            value = _mean([math.sqrt(c * q) for c, q in zip(consistency, quality, strict=True)])
        else:
            value = math.sqrt(_mean(following) * _mean(quality))
        parts = {
            "prompt_following": _mean(following),
            "consistency": _mean(consistency),
            "quality": _mean(quality),
            "passes": float(len(read)),
        }
        return Row(value, parts, "; ".join(p[2] for p in read[0] if p[2]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def read_pair(reply: Reply) -> Pair:
    """Two scores of 0..25, rescaled to 0..10, and the reasoning of a JSON answer.

    Raises:
        UnreadableError: not ``{"reasoning": ..., "score": [a, b]}`` with scores on their scale.
    """
    record = exactly(json_object(reply.text), ["reasoning", "score"], "the answer")
    scores = record["score"]
    if not isinstance(scores, list) or len(scores) != 2:
        raise UnreadableError(f"'score' must be a list of two numbers, got {scores!r}")
    a, b = (number_in(s, 0.0, TOP, "a score") / RESCALE for s in scores)
    return a, b, text_in(record["reasoning"], "the reasoning")
