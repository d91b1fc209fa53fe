"""Two pictures compared, in both orders, so that the order cannot decide.

``context["opponent"]`` holds the other picture of each sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vision_rewards.cards import info_of
from vision_rewards.judge.backend import Query, Reply
from vision_rewards.judge.base import Answer, JudgeReward, Row
from vision_rewards.judge.choices import normalised
from vision_rewards.judge.parsing import UnreadableError, exactly, json_object, text_in
from vision_rewards.judge.templates import quoted

Verdict = tuple[float, str]  # preference for the picture shown first, in [0, 1], and the reason
VERDICTS = {"A": 1.0, "B": 0.0, "tie": 0.5}


class PairJudge(JudgeReward):
    """Base of comparisons: implement :meth:`question` and :meth:`verdict`.

    The value is the mean preference for the candidate over both orders, in [0, 1]; judges that
    contradict themselves say 0.5, a tie. ``parts`` keeps the preference for the candidate when it
    was shown ``first`` and when it was shown ``second``. A sample of which one order could not be
    read is unscored: half a comparison is biased by position.
    """

    both_orders = True  # nobody needs to ask again with the pictures exchanged

    def question(self, prompt: str, images: Sequence[Image.Image]) -> Query:
        """The question about two pictures in this order, behind those of :meth:`lead`."""
        return self.query(self.template.fill(prompt=quoted(prompt)), images)

    def lead(self, facts: Mapping[str, Any]) -> tuple[Image.Image, ...]:
        """Pictures shown before the two, in both orders: none here."""
        return ()

    def verdict(self, reply: Reply) -> Verdict:
        """Preference for the first picture, and why. Raises ``UnreadableError``."""
        raise NotImplementedError

    def judge(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Row]:
        """Two questions for each picture: the candidate first, then the opponent first."""
        queries = []
        for picture, prompt, facts in zip(pictures, prompts, context, strict=True):
            opponent = self.fitted(facts["opponent"], "context['opponent']")
            lead = self.lead(facts)
            queries.append(self.question(prompt, (*lead, picture, opponent)))
            queries.append(self.question(prompt, (*lead, opponent, picture)))
        answers = self.ask(queries, self.verdict)
        return [_row(a, b) for a, b in zip(answers[::2], answers[1::2], strict=True)]


def _row(ahead: Answer[Verdict], behind: Answer[Verdict]) -> Row:
    for shown, answer in (("first", ahead), ("second", behind)):
        if answer.value is None:
            return Row(note=f"with the candidate {shown}: {answer.reason}")
    assert ahead.value is not None and behind.value is not None
    first, second = ahead.value[0], 1 - behind.value[0]
    reasons = [f"as {n}: {v[1]}" for n, v in (("A", ahead.value), ("B", behind.value)) if v[1]]
    return Row((first + second) / 2, {"first": first, "second": second}, "; ".join(reasons))


class PairwiseJudge(PairJudge):
    """Which of two pictures fits the prompt better: A, B or a tie, with a reason.

    Args:
        soft: read the probability ``p(A) / (p(A) + p(B))`` of a one-word answer instead of a
            verdict in words; no ties, no reasons, one token.
        judge: see :class:`~vision_rewards.judge.base.JudgeReward`.
    """

    info = info_of("pairwise_judge")

    def __init__(
        self, checkpoint: str | Path | None = None, *, soft: bool = False, **judge: Any
    ) -> None:
        self.soft = soft
        self.template_name = "pairwise_soft" if soft else "pairwise"
        super().__init__(checkpoint, **judge)

    def question(self, prompt: str, images: Sequence[Image.Image]) -> Query:
        """The question; with ``soft`` only the first token of its answer is made."""
        if not self.soft:
            return super().question(prompt, images)
        text = self.template.fill(prompt=quoted(prompt))
        return self.query(text, images, choices=("A", "B"), max_tokens=1)

    def verdict(self, reply: Reply) -> Verdict:
        """Preference for the first picture, and why."""
        if self.soft:
            if reply.choice_log_probs is None:
                raise UnreadableError("neither A nor B is among its likely tokens")
            return normalised(reply.choice_log_probs, "A"), ""
        record = exactly(json_object(reply.text), ["reason", "winner"], "the answer")
        winner = text_in(record["winner"], "the winner")
        if winner not in VERDICTS:
            raise UnreadableError(f"the winner must be one of {', '.join(VERDICTS)}: {winner!r}")
        return VERDICTS[winner], text_in(record["reason"], "the reason")
