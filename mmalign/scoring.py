"""Scoring many pictures with one reward model: unreadable files, progress, a journal to resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mmalign.pictures import MAX_PIXELS, PictureError, batches
from mmalign.protocols import RewardInfo, RewardModel
from mmalign.runtime.log import JsonlLog, LogError, read_jsonl
from mmalign.runtime.progress import track
from mmalign.types import Media, Score

_FORMAT = 1


class JournalError(ValueError):
    """A journal that belongs to something else; the message says what to do."""


class Journal:
    """Finished scores, one JSON line each, so that an interrupted run continues where it was.

    A picture is recognised by its path, size, time of change, prompt and context.  Only scored
    pictures count as finished: those that were unscored are tried again.

    Args:
        path: the file; made where it does not exist. A torn last line is dropped.
        identity: of the reward model.
        overwrite: start again where the file holds scores of another reward.

    Raises:
        JournalError: the file is no journal, or holds scores of another reward.
    """

    def __init__(self, path: str | Path, identity: str, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.identity = identity
        try:
            records = self._records()
        except JournalError:
            if not overwrite:
                raise
            self.path.unlink()
            records = []
        self._done = {r["key"]: r for r in records if r["valid"]}
        self._log = JsonlLog(self.path)
        if not self.path.stat().st_size:
            self._log.write({"journal": _FORMAT, "reward": identity})

    def _records(self) -> list[dict[str, Any]]:
        try:
            head, *records = read_jsonl(self.path) or [{"journal": _FORMAT}]
        except LogError as error:
            raise JournalError(f"{error}; delete it to start again") from error
        if head.get("journal") != _FORMAT:
            raise JournalError(f"{self.path} is no journal of scores; choose another name")
        held = head.get("reward", self.identity)
        if held != self.identity:
            raise JournalError(
                f"{self.path} holds {len(records)} scores of another reward, {held!r}; this is "
                f"{self.identity!r}. Choose another output, or start again with --overwrite "
                "(overwrite=True)"
            )
        return records

    def split(self, keys: Sequence[str]) -> tuple[list[int], Score | None, list[int]]:
        """Places that are finished, their scores (``None`` for none), and places still to do."""
        done = [i for i, key in enumerate(keys) if key in self._done]
        rest = [i for i, key in enumerate(keys) if key not in self._done]
        found = [self._done[keys[i]] for i in done]
        if not found:
            return [], None, rest
        names = found[0]["parts"]
        score = Score(
            torch.tensor([r["value"] for r in found]),
            torch.ones(len(found), dtype=torch.bool),
            {n: torch.tensor([r["parts"][n] for r in found]) for n in names},
            tuple(r["note"] for r in found),
            self.identity,
        )
        return done, score, rest

    def write(self, keys: Sequence[str], score: Score) -> None:
        """Add the scores of the pictures with these keys."""
        parts = {name: part.tolist() for name, part in score.parts.items()}
        rows = zip(keys, score.value.tolist(), score.valid.tolist(), strict=True)
        for i, (key, value, valid) in enumerate(rows):
            record = {"key": key, "value": value, "valid": valid}
            record["note"] = score.notes[i] if score.notes else ""
            self._log.write({**record, "parts": {name: part[i] for name, part in parts.items()}})

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._log.close()


def picture_key(path: Path, prompt: str, context: Mapping[str, Any]) -> str:
    """By what a journal recognises a file: where it is, size, time of change, prompt, context."""
    try:
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
    except OSError:  # it has gone: scoring will say so
        state = []
    said = [str(path.absolute()), state, prompt, dict(context)]
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def prompts_for(prompts: str | Sequence[str] | None, count: int, info: RewardInfo) -> list[str]:
    """One prompt for each of ``count`` pictures, of one for all, one each, or none.

    Raises:
        ValueError: another number of prompts, or none for a reward that needs them.
    """
    if prompts is None:
        if "prompt" in info.needs:
            raise ValueError(f"reward {info.name!r} judges pictures by their prompts; give prompts")
        return [""] * count
    texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count:
        raise ValueError(f"{len(texts)} prompts for {count} pictures; give one, or one each")
    return texts


def score_pictures(
    model: RewardModel,
    pictures: Media | list[Any],
    prompts: Sequence[str],
    context: Sequence[Mapping[str, Any]] | None = None,
    *,
    batch_size: int = 32,
    max_pixels: int = MAX_PIXELS,
    journal: Journal | None = None,
    progress: bool = False,
) -> Score:
    """Scores ``(B,)`` in the order of ``pictures``, without gradients.

    A file that cannot be read is ``valid=False`` with a note that names it. With a journal,
    pictures that it holds are not read again, and every finished batch is added to it.

    Raises:
        ValueError: a journal for pictures that are not files, or not one context each.
    """
    count = len(pictures)
    if context is not None and len(context) != count:
        raise ValueError(f"{len(context)} contexts for {count} pictures; give one each")
    keys = _keys(pictures, prompts, context) if journal else []
    order, found, todo = journal.split(keys) if journal else ([], None, list(range(count)))
    scores = [] if found is None else [found]
    rest = pictures[todo] if isinstance(pictures, Media) else [pictures[i] for i in todo]
    with torch.no_grad(), track("score", count, len(order), progress) as advance:
        for places, batch in batches(rest, batch_size, max_pixels):
            rows = [todo[p] for p in places]
            facts = None if context is None else [context[i] for i in rows]
            score = _scored(model, batch, [prompts[i] for i in rows], facts)
            if journal:
                journal.write([keys[i] for i in rows], score)
            scores.append(score)
            order += rows
            advance(len(rows))
    return Score.cat(scores)[sorted(range(count), key=order.__getitem__)]


def _scored(
    model: RewardModel,
    batch: Media | PictureError,
    prompts: Sequence[str],
    context: Sequence[Mapping[str, Any]] | None,
) -> Score:
    if isinstance(batch, Media):
        return model.score(batch, prompts, context)
    return Score.of(torch.full((1,), torch.nan), model.identity, [str(batch)])


def _keys(
    pictures: Media | list[Any],
    prompts: Sequence[str],
    context: Sequence[Mapping[str, Any]] | None,
) -> list[str]:
    if isinstance(pictures, Media) or not all(isinstance(p, Path) for p in pictures):
        raise ValueError("a journal recognises pictures by their files; give paths or a folder")
    facts = context or [{}] * len(pictures)
    return [picture_key(*row) for row in zip(pictures, prompts, facts, strict=True)]
