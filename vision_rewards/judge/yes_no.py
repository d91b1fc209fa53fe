"""Rewards read from the probability of the word "yes"."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vision_rewards.cards import info_of
from vision_rewards.judge.backend import Query, Reply
from vision_rewards.judge.base import Answer, JudgeReward, Row
from vision_rewards.judge.choices import normalised
from vision_rewards.judge.parsing import UnreadableError
from vision_rewards.judge.templates import load_template, quoted

YES_NO = ("yes", "no")
VERDICT_AFTER = r"(?i)answer\s*\**\s*:\s*\**"
_VERDICT = re.compile(r"[\W_]*(?:yes|no)\b", re.IGNORECASE)
LogProbs = Mapping[str, float]


def yes_no_log_probs(reply: Reply) -> LogProbs:
    """Log-probabilities of yes and no. Raises ``UnreadableError`` where neither is likely."""
    if reply.choice_log_probs is None:
        raise UnreadableError("neither yes nor no is among the likely tokens at its verdict")
    return reply.choice_log_probs


def reasoned_log_probs(reply: Reply) -> LogProbs:
    """The same behind a chain of thought, which must end in a verdict.

    Raises:
        UnreadableError: the last "answer:" is no verdict, as in thoughts that were cut off; the
            probabilities behind it would be of other words.
    """
    ends = [m.end() for m in re.finditer(VERDICT_AFTER, reply.text)]
    if not ends or not _VERDICT.match(reply.text, ends[-1]):
        raise UnreadableError('it does not end with "Answer: yes" or "Answer: no"')
    return yes_no_log_probs(reply)


class YesNoJudge(JudgeReward):
    """``p(yes) / (p(yes) + p(no))`` that a picture does what its prompt asks, in [0, 1].

    Where ``context["reference"]`` holds a picture, the question is whether the candidate does it
    better than the reference (RewardDance, Wu et al. 2025, arXiv:2509.08826); it is asked in both
    orders, and the value is the mean of ``P(yes)`` with the candidate named and of ``1 - P(yes)``
    with the reference named.  ``parts``: ``yes``, the unnormalised probability of yes in the first
    question, and ``mass``, that of yes and no together; a small mass says that the model did not
    understand what to answer.

    Args:
        instructions: what to pay attention to, put before the question.
        reasoning: let the model think first (chain of thought); the probabilities are read where
            its verdict stands.
        judge: see :class:`~vision_rewards.judge.base.JudgeReward`.
    """

    info = info_of("yes_no_judge")
    template_name = "yes_no"

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        instructions: str = "",
        reasoning: bool = False,
        **judge: Any,
    ) -> None:
        self.instructions, self.reasoning = instructions, reasoning
        self.pair_template = load_template("yes_no_reference")
        super().__init__(checkpoint, **judge)

    def settings(self) -> dict[str, Any]:
        """Those of every judge, the instructions and whether it reasons."""
        own = [self.instructions, self.reasoning, self.pair_template.fingerprint]
        return {**super().settings(), "yes_no": own}

    def judge(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Row]:
        """One question for each picture, two where it has a reference."""
        asked = [
            self._queries(picture, prompt, facts)
            for picture, prompt, facts in zip(pictures, prompts, context, strict=True)
        ]
        parse = reasoned_log_probs if self.reasoning else yes_no_log_probs
        answers = iter(self.ask([q for queries in asked for q in queries], parse))
        return [self._row([next(answers) for _ in queries]) for queries in asked]

    def _queries(self, picture: Image.Image, prompt: str, facts: Mapping[str, Any]) -> list[Query]:
        if facts.get("reference") is None:
            return [self._question(self.template.fill(**self._words(prompt)), [picture])]
        reference = self.fitted(facts["reference"], "context['reference']")
        text = self.pair_template.fill(**self._words(prompt))
        return [self._question(text, pair) for pair in ([picture, reference], [reference, picture])]

    def _words(self, prompt: str) -> dict[str, str]:
        how = (
            'Think step by step first, then end with one line, "Answer: yes" or "Answer: no".'
            if self.reasoning
            else "Please answer yes or no."
        )
        lead = f"{self.instructions.strip()}\n" if self.instructions.strip() else ""
        return {"prompt": quoted(prompt), "instructions": lead, "how": how}

    def _question(self, text: str, images: Sequence[Image.Image]) -> Query:
        if self.reasoning:
            return self.query(text, images, choices=YES_NO, verdict_after=VERDICT_AFTER)
        return self.query(text, images, choices=YES_NO, max_tokens=1)

    def _row(self, answers: Sequence[Answer[LogProbs]]) -> Row:
        for answer in answers:
            if answer.value is None:
                return Row(note=answer.reason)
        logs = [a.value for a in answers if a.value is not None]
        shares = [normalised(p, "yes") for p in logs]
        value = shares[0] if len(shares) == 1 else (shares[0] + 1 - shares[1]) / 2
        yes, no = (math.exp(logs[0][word]) for word in YES_NO)
        note = answers[0].text if self.reasoning else ""
        return Row(value, {"yes": yes, "mass": yes + no}, note)


class VqaScore(JudgeReward):
    """``P("Yes")`` to "Does this figure show "..."? Please answer yes or no.", in [0, 1].

    VQAScore (Lin et al. 2024, arXiv:2404.01291) with any vision-language model; the paper's own
    numbers need its CLIP-FlanT5. All spellings of "yes" count. ``parts``: ``ratio``, the share
    ``p(yes) / (p(yes) + p(no))``, which is better behaved where a model likes other words.

    Args:
        ratio: use that share as the value.
        judge: see :class:`~vision_rewards.judge.base.JudgeReward`.
    """

    info = info_of("vqascore")
    template_name = "vqascore"

    def __init__(
        self, checkpoint: str | Path | None = None, *, ratio: bool = False, **judge: Any
    ) -> None:
        self.ratio = ratio
        super().__init__(checkpoint, **judge)

    def settings(self) -> dict[str, Any]:
        """Those of every judge, and which number is the value."""
        return {**super().settings(), "ratio": self.ratio}

    def judge(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Row]:
        """One question and one token for each picture."""
        queries = [
            self.query(self.template.fill(prompt=prompt), [picture], choices=YES_NO, max_tokens=1)
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return [self._row(answer) for answer in self.ask(queries, yes_no_log_probs)]

    def _row(self, answer: Answer[LogProbs]) -> Row:
        if answer.value is None:
            return Row(note=answer.reason)
        ratio, yes = normalised(answer.value, "yes"), math.exp(answer.value["yes"])
        return Row(ratio if self.ratio else yes, {"yes": yes, "ratio": ratio})
