"""Answers in words: one adapter that lets any judge compare two answers to a question on pictures.

The judge is asked ``votes`` times which answer is better, a forced choice between A and B. With
``order="balanced"`` the two answers change places from vote to vote; with ``"random"`` each vote
draws its order (a hash of item and vote, the same on every machine), as VL-RewardBench does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image

from eval.reward_benchmarks.items import Candidate, Item, Judged
from eval.reward_benchmarks.scoring import Settings
from eval.reward_benchmarks.video import read_video
from mmalign.pictures import PictureError
from mmalign.protocols import RewardModel
from mmalign.runtime.progress import track
from mmalign.scoring import Journal
from mmalign.types import Media, Score
from vision_rewards.judge.backend import Query, Reply, digest
from vision_rewards.judge.base import JudgeReward
from vision_rewards.judge.parsing import UnreadableError, exactly, json_object, text_in
from vision_rewards.judge.templates import load_template

Order = Literal["balanced", "random"]
CHUNK = 8  # items between two entries in the journal
RESAMPLING_TEMPERATURE = 0.7  # of more than two votes, which would be copies without sampling
PARTS = ("agree", "reject", "unreadable", "first", "second")


class AnswerJudge:
    """A judge's back-end, asked about answers in words.

    Args:
        judge: any :class:`~vision_rewards.judge.base.JudgeReward`; its settings are kept, its own
            question is not used.
        votes: how often each pair is asked about; 2 with balanced order is once in each order.
        order: see the module.

    Raises:
        ValueError: not a judge, or fewer than one vote.
    """

    def __init__(self, judge: RewardModel, votes: int = 2, order: Order = "balanced") -> None:
        if not isinstance(judge, JudgeReward):
            raise ValueError(
                f"reward {judge.info.name!r} scores pictures; answers in words are compared by "
                "judges only, such as pairwise_judge (see docs/rewards-judges.md)"
            )
        if votes < 1:
            raise ValueError(f"votes must be 1 or more, got {votes}")
        self.judge, self.votes, self.order = judge, votes, order
        self.template = load_template("answers")
        self.temperature = judge.temperature
        if votes > 2 and not self.temperature:
            self.temperature = RESAMPLING_TEMPERATURE

    @property
    def identity(self) -> str:
        """The judge, the question, votes and order."""
        own = digest([self.template.fingerprint, self.votes, self.order, self.temperature])
        return f"{self.judge.identity}-answers-{own}"

    def judge_items(
        self, items: Sequence[Item], settings: Settings, journal: Journal | None = None
    ) -> list[Judged]:
        """What the judge says of every item: preference for the first answer, and the votes."""
        keys = [_key(item) for item in items]
        done, found, todo = journal.split(keys) if journal else ([], None, range(len(items)))
        judged = {} if found is None else dict(zip(done, _rows(found), strict=True))
        todo = list(todo)
        with track(settings.progress, len(items), len(done), bool(settings.progress)) as advance:
            for at in range(0, len(todo), CHUNK):
                places = todo[at : at + CHUNK]
                score = self._asked([items[i] for i in places], settings)
                if journal:
                    journal.write([keys[i] for i in places], score)
                judged |= zip(places, _rows(score), strict=True)
                advance(len(places))
        return [_judged(item, *judged[place]) for place, item in enumerate(items)]

    def _asked(self, items: Sequence[Item], settings: Settings) -> Score:
        asked: list[tuple[int, bool, Query]] = []
        tallies = [_Tally() for _ in items]
        for place, item in enumerate(items):
            try:
                pictures = _pictures(item, settings)
            except PictureError as error:
                tallies[place].note = str(error)
                continue
            for vote in range(self.votes):
                ahead = self._first_ahead(item, vote)
                asked.append((place, ahead, self._query(item, pictures, ahead, vote)))
        answers = self.judge.ask([q for _, _, q in asked], read_winner)
        for (place, ahead, _), answer in zip(asked, answers, strict=True):
            tallies[place].count(answer.value, ahead, answer.reason)
        return _score([t.row() for t in tallies], [t.note for t in tallies], self.identity)

    def _first_ahead(self, item: Item, vote: int) -> bool:
        if self.order == "balanced":
            return vote % 2 == 0
        drawn = hashlib.sha256(f"{item.key} {vote}".encode()).digest()[0]
        return drawn % 2 == 0

    def _query(self, item: Item, pictures: Sequence[Any], ahead: bool, vote: int) -> Query:
        texts = [c.text for c in item.candidates]
        a, b = texts if ahead else texts[::-1]
        text = self.template.fill(question=item.prompt, a=a, b=b)
        return self.judge.query(
            text, pictures, temperature=self.temperature, seed=self.judge.seed + vote
        )


def read_winner(reply: Reply) -> bool:
    """Whether A, the answer shown first, is better.

    Raises:
        UnreadableError: not ``{"reason": ..., "winner": "A" or "B"}``.
    """
    record = exactly(json_object(reply.text), ["reason", "winner"], "the answer")
    winner = text_in(record["winner"], "the winner")
    if winner not in ("A", "B"):
        raise UnreadableError(f"the winner must be A or B, got {winner!r}")
    return winner == "A"


class _Tally:
    """Votes on one item."""

    def __init__(self) -> None:
        self.votes: dict[bool, list[bool]] = {True: [], False: []}  # by order: the first one won
        self.unreadable = 0
        self.note = ""

    def count(self, first_shown_won: bool | None, ahead: bool, reason: str) -> None:
        """Count one answer; ``ahead`` says whether the item's first answer was shown first."""
        if first_shown_won is None:
            self.unreadable += 1
            self.note = reason
        else:
            self.votes[ahead].append(first_shown_won == ahead)

    def row(self) -> dict[str, float]:
        """The numbers that are kept."""
        won = [v for votes in self.votes.values() for v in votes]
        agree = float(sum(won))
        return {
            "value": _mean(won),
            "agree": agree,
            "reject": len(won) - agree,
            "unreadable": float(self.unreadable),
            "first": _mean(self.votes[True]),
            "second": _mean(self.votes[False]),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _score(rows: Sequence[Mapping[str, float]], notes: Sequence[str], identity: str) -> Score:
    value = torch.tensor([row["value"] for row in rows])
    parts = {name: torch.tensor([row[name] for row in rows]) for name in PARTS}
    return Score(value, torch.isfinite(value), parts, tuple(notes), identity)


def _rows(score: Score) -> list[tuple[float, dict[str, float], str]]:
    notes = score.notes or ("",) * len(score)
    return [
        (v if ok else math.nan, {n: float(p[i]) for n, p in score.parts.items()}, notes[i])
        for i, (v, ok) in enumerate(zip(score.value.tolist(), score.valid.tolist(), strict=True))
    ]


def _judged(item: Item, value: float, parts: Mapping[str, float], note: str) -> Judged:
    orders = (parts["first"], parts["second"])
    both = (orders,) if all(map(math.isfinite, orders)) else ()
    return Judged(item, (value, 1 - value), both, parts, "" if math.isfinite(value) else note)


def _pictures(item: Item, settings: Settings) -> list[Image.Image]:
    """The pictures of a question: files, and frames of a video."""
    found = [c.open() for c in item.context.get("images", ())]
    video = item.context.get("video")
    if isinstance(video, Candidate):
        found += Media(read_video(video.source, settings.frames)).to_pil()
    return found


def _key(item: Item) -> str:
    said = [item.key, item.prompt, item.facts, *(c.id for c in item.candidates)]
    return digest(said, 32)
