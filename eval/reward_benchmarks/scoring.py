"""Asking a reward about every item: each picture with its prompt once, pairs in both orders.

Every question (:class:`Ask`) has a key of what it is about, so that a picture in many pairs is
scored once, and an interrupted run finds its answers in the journal.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eval.metrics.selection import swapped_preference
from eval.reward_benchmarks.items import Candidate, Item, Judged
from eval.reward_benchmarks.video import read_video
from mmalign.pictures import PictureError
from mmalign.protocols import RewardModel
from mmalign.runtime.progress import track
from mmalign.scoring import Journal, score_pictures
from mmalign.types import Media, Score
from vision_rewards.guard import GuardedReward

CHUNK = 8  # batches between two entries in the journal; also what is in memory at once


@dataclass(frozen=True)
class Ask:
    """One question to a reward: a candidate, perhaps against an opponent or within a group."""

    candidate: Candidate
    prompt: str
    facts: str
    context: Mapping[str, Any]
    opponent: Candidate | None = None
    group: str = ""

    @property
    def key(self) -> str:
        """A digest of what is asked."""
        other = None if self.opponent is None else self.opponent.id
        said = [self.candidate.id, other, self.prompt, self.facts, self.group]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Said:
    """The answer to one question; ``value`` is NaN where there is none."""

    value: float = math.nan
    parts: Mapping[str, float] | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to ask: pictures at once, where they are scored, frames of a video, progress shown."""

    batch_size: int = 32
    device: torch.device | None = None
    frames: int = 8
    video: bool = False
    progress: str = ""


def judge_items(
    model: RewardModel, items: Sequence[Item], settings: Settings, journal: Journal | None = None
) -> list[Judged]:
    """What ``model`` says of every item, in order.

    * A pointwise reward scores each (candidate, prompt, context) once.
    * A pairwise reward meets every pair of an item's candidates, in both orders; rewards that
      ask in both orders themselves (``both_orders``) are asked once. The score of a candidate is
      its mean preference.
    * A group reward sees the candidates of an item together.
    """
    own = {item.key: _asks(model, item) for item in items}
    asks = {ask.key: ask for some in own.values() for ask in some}
    said = _answers(model, list(asks.values()), settings, journal)
    read = _compared if model.info.scope == "pairwise" else _valued
    return [read(item, [said[a.key] for a in own[item.key]]) for item in items]


# --- questions --------------------------------------------------------------------------------


def _asks(model: RewardModel, item: Item) -> list[Ask]:
    def ask(candidate: Candidate, opponent: Candidate | None = None, group: str = "") -> Ask:
        return Ask(candidate, item.prompt, item.facts, item.context, opponent, group)

    if model.info.scope == "group":  # a score among others is one among these others
        others = " ".join(c.id for c in item.candidates)
        return [ask(c, group=f"{item.key} {others}") for c in item.candidates]
    if model.info.scope == "pointwise":
        return [ask(c) for c in item.candidates]
    twice = not getattr(model, "both_orders", False)
    found = []
    for i, j in pairs_of(item):
        found.append(ask(item.candidates[i], item.candidates[j]))
        if twice:
            found.append(ask(item.candidates[j], item.candidates[i]))
    return found


def pairs_of(item: Item) -> list[tuple[int, int]]:
    """Every pair of an item's candidates, by their places."""
    count = len(item.candidates)
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


# --- answers ----------------------------------------------------------------------------------


def _valued(item: Item, said: Sequence[Said]) -> Judged:
    scores = tuple(_of_dimension(s, item.dimension) for s in said)
    note = "; ".join(dict.fromkeys(s.note for s in said if s.note and math.isnan(s.value)))
    return Judged(item, scores, note=note)


def _of_dimension(said: Said, dimension: str) -> float:
    """The part that is named like the dimension, where the reward has one; else the value."""
    if math.isnan(said.value):
        return math.nan
    return (said.parts or {}).get(dimension, said.value)


def _compared(item: Item, said: Sequence[Said]) -> Judged:
    pairs = pairs_of(item)
    orders = [_orders(s) for s in said]
    if len(said) == 2 * len(pairs):  # a question for each order
        orders = [(a.value, 1 - b.value) for a, b in zip(said[::2], said[1::2], strict=True)]
    won: list[list[float]] = [[] for _ in item.candidates]
    for (i, j), (first, second) in zip(pairs, orders, strict=True):
        preference = swapped_preference(first, second)
        won[i].append(preference)
        won[j].append(1 - preference)
    scores = tuple(sum(w) / len(w) if w else math.nan for w in won)
    whole = tuple(o for o in orders if math.isfinite(o[0] + o[1]))
    note = "; ".join(dict.fromkeys(s.note for s in said if s.note and math.isnan(s.value)))
    return Judged(item, scores, whole, note=note)


def _orders(said: Said) -> tuple[float, float]:
    parts = said.parts or {}
    return parts.get("first", said.value), parts.get("second", said.value)


def _answers(
    model: RewardModel, asks: Sequence[Ask], settings: Settings, journal: Journal | None
) -> dict[str, Said]:
    """The answer to every question by its key; those in the journal are not asked again."""
    keys = [ask.key for ask in asks]
    groups = _groups(asks)
    done, found, todo = journal.split(keys, groups) if journal else ([], None, range(len(asks)))
    said = {} if found is None else _said([keys[i] for i in done], found)
    guarded = GuardedReward(model, max_failed_share=1.0)
    with track(settings.progress, len(asks), len(done), bool(settings.progress)) as advance:
        for chunk in _chunks([asks[i] for i in todo], settings.batch_size * CHUNK):
            score = _scored(guarded, chunk, settings)
            own = [ask.key for ask in chunk]
            if journal:
                journal.write(own, score)
            said |= _said(own, score)
            advance(len(chunk))
    return said


def _groups(asks: Sequence[Ask]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for place, ask in enumerate(asks):
        if ask.group:
            found.setdefault(ask.group, []).append(place)
    return list(found.values())


def _chunks(asks: Sequence[Ask], size: int) -> Iterator[list[Ask]]:
    """At most about ``size`` questions; those of one group stay together."""
    chunk: list[Ask] = []
    for ask in asks:
        if len(chunk) >= size and (not ask.group or ask.group != chunk[-1].group):
            yield chunk
            chunk = []
        chunk.append(ask)
    if chunk:
        yield chunk


def _said(keys: Sequence[str], score: Score) -> dict[str, Said]:
    parts = {name: part.tolist() for name, part in score.parts.items()}
    rows = zip(keys, score.value.tolist(), score.valid.tolist(), strict=True)
    return {
        key: Said(
            value if valid else math.nan,
            {name: part[i] for name, part in parts.items()},
            score.notes[i] if score.notes else "",
        )
        for i, (key, value, valid) in enumerate(rows)
    }


# --- one chunk --------------------------------------------------------------------------------


def _scored(model: GuardedReward, asks: Sequence[Ask], settings: Settings) -> Score:
    """Scores of questions whose pictures can be read; the others are unscored, with the reason."""
    opened: list[tuple[int, Any, dict[str, Any]]] = []
    notes: dict[int, str] = {}
    for place, ask in enumerate(asks):
        try:
            opened.append((place, _opened(ask.candidate, settings), _context(ask, settings)))
        except PictureError as error:
            notes[place] = str(error)
    lost = [Score.of(torch.full((1,), torch.nan), model.identity, [n]) for n in notes.values()]
    scores = [_score_opened(model, [asks[p] for p, _, _ in opened], opened, settings)]
    places = [p for p, _, _ in opened] + list(notes)
    joined = Score.cat([*(s for s in scores if len(s)), *lost])
    return joined[sorted(range(len(places)), key=places.__getitem__)]


def _score_opened(
    model: GuardedReward, asks: Sequence[Ask], opened: Sequence[tuple[int, Any, Any]], s: Settings
) -> Score:
    if not asks:
        return Score.of(torch.zeros(0), model.identity)
    prompts, facts = [ask.prompt for ask in asks], [facts for _, _, facts in opened]
    if s.video:
        return _score_videos(model, [video for _, video, _ in opened], prompts, facts, s)
    largest = max(map(len, _groups(asks)), default=1)
    pictures = [picture for _, picture, _ in opened]
    return score_pictures(
        model, pictures, prompts, facts, batch_size=max(s.batch_size, largest), device=s.device
    )


def _score_videos(
    model: GuardedReward,
    videos: Sequence[torch.Tensor],
    prompts: Sequence[str],
    facts: Sequence[Mapping[str, Any]],
    settings: Settings,
) -> Score:
    """Videos of one shape share a batch."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, video in enumerate(videos):
        alike.setdefault(tuple(video.shape), []).append(row)
    scores, order = [], []
    with torch.no_grad():
        for rows in alike.values():
            for at in range(0, len(rows), settings.batch_size):
                some = rows[at : at + settings.batch_size]
                batch = torch.stack([videos[r] for r in some]).to(settings.device)
                own = [prompts[r] for r in some], [facts[r] for r in some]
                scores.append(model.score(Media(batch), *own).to("cpu"))
                order += some
    return Score.cat(scores)[sorted(range(len(order)), key=order.__getitem__)]


def _opened(candidate: Candidate, settings: Settings) -> Any:
    if settings.video:
        return read_video(candidate.source, settings.frames)
    return candidate.open()


def _context(ask: Ask, settings: Settings) -> dict[str, Any]:
    """The facts with candidates opened, the opponent, and the group."""
    facts = {k: v.open() if isinstance(v, Candidate) else v for k, v in ask.context.items()}
    if ask.opponent is not None:
        facts["opponent"] = _opened(ask.opponent, settings)
    if ask.group:
        facts["group"] = ask.group
    return facts


def unscored(judged: Sequence[Judged]) -> dict[str, int]:
    """How many items could not be scored, by reason.

    Reasons that differ in their numbers, or in the answer that a judge gave, are one; the first of
    them speaks for all. That of each item is kept with its scores.
    """
    kinds: dict[str, str] = {}
    counts: dict[str, int] = {}
    for j in judged:
        if not j.scored:
            note = j.note or "no reason given"
            kind = re.sub(r"\d+", "", note.partition("; the last one was")[0])
            first = kinds.setdefault(kind, note)
            counts[first] = counts.get(first, 0) + 1
    return counts
