"""UnifiedReward (Wang et al. 2025, arXiv:2503.05236): its questions and the answers it was taught.

Version 1 ends in ``Final Score: x``; 2.0 scores three axes, and for pairs shares of each; Think
reasons first and names the winner in ``<answer>`` tags. Edit judges edits of a source picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmalign.registry import unknown
from vision_rewards.cards import info_of
from vision_rewards.judge.backend import Reply
from vision_rewards.judge.base import Answer, JudgeReward, Row
from vision_rewards.judge.pairwise import PairJudge, Verdict
from vision_rewards.judge.parsing import (
    NUMBER,
    UnreadableError,
    labelled_number,
    number_in,
    one_of,
    tagged,
    without_thoughts,
)
from vision_rewards.judge.templates import quoted

LOW, HIGH = 1.0, 5.0
AXES = ("alignment", "coherence", "style")
EDIT_AXES = ("instruction_following", "quality")
RANKS = {
    "image 1 is better": 1.0,
    "image 2 is better": 0.0,
    "both images are equally good": 0.5,
}
_SHARES = re.compile(rf"Image\s*([12])\s*\**\s*:\s*\**\s*({NUMBER})", re.IGNORECASE)


class UnifiedReward(JudgeReward):
    """A score of 1 to 5, divided by 5 as Flow-GRPO does, so in [0.2, 1].

    Args:
        mode: ``overall`` reads ``Final Score: x``; ``axes`` (version 2.0) reads alignment,
            coherence and style, the value is a fifth of their mean; ``edit`` reads instruction
            following and quality of an edit of ``context["source"]`` in the same way, the prompt
            being the instruction. ``parts`` holds the raw scores.
        judge: see :class:`~vision_rewards.judge.base.JudgeReward`. Pictures are resized to
            512 x 512 unless ``size`` says otherwise.
    """

    info = info_of("unified_reward")
    default_size = 512

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        mode: Literal["overall", "axes", "edit"] = "overall",
        **judge: Any,
    ) -> None:
        if mode not in _PARSERS:
            raise unknown("mode", mode, _PARSERS)
        self.mode, self.template_name = mode, f"unified_{mode}"
        super().__init__(checkpoint, **judge)
        if mode == "edit":
            self.info = replace(self.info, needs=("prompt", "source"))

    def settings(self) -> dict[str, Any]:
        """Those of every judge, and the mode."""
        return {**super().settings(), "mode": self.mode}

    def judge(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Row]:
        """One question for each picture."""
        queries = []
        for picture, prompt, facts in zip(pictures, prompts, context, strict=True):
            lead = _source(self, facts) if self.mode == "edit" else ()
            text = self.template.fill(prompt=quoted(prompt))
            queries.append(self.query(text, [*lead, picture]))
        return [_row(answer) for answer in self.ask(queries, _PARSERS[self.mode])]


def _source(judge: JudgeReward, facts: Mapping[str, Any]) -> tuple[Image.Image]:
    return (judge.fitted(facts["source"], "context['source']"),)


def _row(answer: Answer[dict[str, float]]) -> Row:
    if answer.value is None:
        return Row(note=answer.reason)
    scores = answer.value
    return Row(sum(scores.values()) / len(scores) / HIGH, scores, answer.text)


def read_overall(reply: Reply) -> dict[str, float]:
    """``{"overall": x}`` of ``Final Score: x``, x in [1, 5]. Raises ``UnreadableError``."""
    text = without_thoughts(reply.text)
    return {"overall": labelled_number(text, "Final Score", LOW, HIGH)}


def read_axes(reply: Reply, axes: Sequence[str] = AXES) -> dict[str, float]:
    """The scores of ``Alignment Score (1-5): x`` and so on. Raises ``UnreadableError``."""
    text = without_thoughts(reply.text)
    return {
        a: labelled_number(text, rf"{_spoken(a)} Score(?:\s*\(1-5\))?", LOW, HIGH) for a in axes
    }


def _spoken(axis: str) -> str:
    return axis.replace("_", " ")


_PARSERS: dict[str, Callable[[Reply], dict[str, float]]] = {
    "overall": read_overall, "axes": read_axes, "edit": partial(read_axes, axes=EDIT_AXES),
}  # fmt: skip


class UnifiedRewardPair(PairJudge):
    """Which of two pictures is better, asked in both orders; value and parts as every comparison.

    Args:
        mode: ``rank`` reads "Image 1 is better" / "Image 2 is better" / "Both images are equally
            good"; ``score`` (version 2.0) reads, for each of three axes, shares of the two images
            that sum to 1, the value is their mean; ``think`` reads the same words as ``rank`` in
            ``<answer>`` tags; ``edit_rank`` and ``edit_score`` compare two edits of
            ``context["source"]``, the prompt being the instruction.
        judge: see :class:`~vision_rewards.judge.base.JudgeReward`.
    """

    info = info_of("unified_reward_pair")
    default_size = 512
    default_max_tokens = 2048

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        mode: Literal["rank", "score", "think", "edit_rank", "edit_score"] = "rank",
        **judge: Any,
    ) -> None:
        if mode not in _PAIR_PARSERS:
            raise unknown("mode", mode, _PAIR_PARSERS)
        self.mode, self.template_name = mode, f"unified_pair_{mode}"
        super().__init__(checkpoint, **judge)
        if mode.startswith("edit"):
            self.info = replace(self.info, needs=("prompt", "source", "opponent"))

    def settings(self) -> dict[str, Any]:
        """Those of every judge, and the mode."""
        return {**super().settings(), "mode": self.mode}

    def lead(self, facts: Mapping[str, Any]) -> tuple[Image.Image, ...]:
        """The source of edits."""
        return _source(self, facts) if self.mode.startswith("edit") else ()

    def verdict(self, reply: Reply) -> Verdict:
        """Preference for the first picture, and the whole answer as the reason."""
        return _PAIR_PARSERS[self.mode](reply), reply.text


def read_rank(reply: Reply) -> float:
    """1, 0 or 0.5 for the first picture. Raises ``UnreadableError``."""
    return one_of(without_thoughts(reply.text), RANKS, "who is better")


def read_think(reply: Reply) -> float:
    """The same in the last ``<answer>`` tags. Raises ``UnreadableError``."""
    return one_of(tagged(without_thoughts(reply.text), "answer"), RANKS, "who is better")


def read_shares(reply: Reply, axes: Sequence[str] = AXES) -> float:
    """Mean share of the first picture over the axes.

    Raises:
        UnreadableError: an axis without both shares, or shares that do not sum to 1.
    """
    blocks = _blocks(without_thoughts(reply.text), [_spoken(a) for a in axes])
    shares = []
    for axis in map(_spoken, axes):
        found: Mapping[str, str] = dict(_SHARES.findall(blocks.get(axis, "")))
        if len(found) != 2:
            raise UnreadableError(f"the block {axis!r} lacks the share of an image")
        first, second = (number_in(float(found[k]), 0.0, 1.0, f"{axis} share") for k in "12")
        if abs(first + second - 1) > 0.02:
            raise UnreadableError(f"the shares of {axis!r} sum to {first + second:g}, not 1")
        shares.append(first)
    return sum(shares) / len(shares)


def _blocks(text: str, axes: Sequence[str]) -> dict[str, str]:
    """The text behind each axis' name up to the next one."""
    parts = re.split(rf"\b({'|'.join(axes)})\b[^:\n]*:", text, flags=re.IGNORECASE)
    return {name.casefold(): body for name, body in zip(parts[1::2], parts[2::2], strict=True)}


_PAIR_PARSERS: dict[str, Callable[[Reply], float]] = {
    "rank": read_rank, "score": read_shares, "think": read_think,
    "edit_rank": read_rank, "edit_score": partial(read_shares, axes=EDIT_AXES),
}  # fmt: skip
