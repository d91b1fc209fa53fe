"""Scoring many pictures with one reward model: unreadable files, progress, a journal to resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mmalign.pictures import MAX_PIXELS, PictureError, batches, whole_groups
from mmalign.protocols import RewardInfo, RewardModel
from mmalign.reward_info import groups_of
from mmalign.runtime.device import pick_device
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

    def split(
        self, keys: Sequence[str], groups: Sequence[Sequence[int]] = ()
    ) -> tuple[list[int], Score | None, list[int]]:
        """Places that are finished, their scores (``None`` for none), and places still to do.

        Of ``groups`` that are compared among themselves all places are to do while any is.
        """
        known = [key in self._done for key in keys]
        for group in groups:
            whole = all(known[i] for i in group)
            for i in group:
                known[i] = whole
        done = [i for i, finished in enumerate(known) if finished]
        rest = [i for i, finished in enumerate(known) if not finished]
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
    device: torch.device | None = None,
) -> Score:
    """Scores ``(B,)`` in the order of ``pictures``, without gradients.

    A file that cannot be read is ``valid=False`` with a note that names it. With a journal,
    pictures that it holds are not read again, and every finished batch is added to it. A reward
    of ``group`` scope sees all pictures of a prompt (or of ``context["group"]``) at once, so that
    the batch size changes no score.

    Args:
        device: where pictures are moved before they are scored; ``None`` leaves them.

    Raises:
        ValueError: a journal for pictures that are not files, not one context each, or a group
            of more than ``batch_size`` pictures.
    """
    count = len(pictures)
    if context is not None and len(context) != count:
        raise ValueError(f"{len(context)} contexts for {count} pictures; give one each")
    groups = _groups(model, prompts, context or [{}] * count, batch_size)
    keys = _keys(pictures, prompts, context, groups) if journal else []
    order, found, todo = journal.split(keys, groups) if journal else ([], None, list(range(count)))
    scores = [] if found is None else [found]
    rest = pictures[todo] if isinstance(pictures, Media) else [pictures[i] for i in todo]
    place = {row: k for k, row in enumerate(todo)}
    left = [[place[i] for i in group] for group in groups if group[0] in place]
    if groups:
        found_batches = whole_groups(rest, left, batch_size, max_pixels)
    else:
        found_batches = batches(rest, batch_size, max_pixels)
    with torch.no_grad(), track("score", count, len(order), progress) as advance:
        for places, batch in found_batches:
            rows = [todo[p] for p in places]
            facts = None if context is None else [context[i] for i in rows]
            score = _scored(model, batch, [prompts[i] for i in rows], facts, device)
            if journal:
                journal.write([keys[i] for i in rows], score)
            scores.append(score)
            order += rows
            advance(len(rows))
    return Score.cat(scores)[sorted(range(count), key=order.__getitem__)]


def _groups(
    model: RewardModel,
    prompts: Sequence[str],
    context: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> list[list[int]]:
    """Rows that ``model`` compares with each other; none where it judges each for itself."""
    if model.info.scope != "group":
        return []
    every = getattr(model, "whole_batch", False)
    groups = [list(range(len(prompts)))] if every else groups_of(prompts, context)
    largest = max(groups, key=len, default=[])
    if len(largest) > batch_size:
        of = "all prompts" if every else f"prompt {prompts[largest[0]]!r}"
        raise ValueError(
            f"reward {model.info.name!r} compares the {len(largest)} pictures of {of} with each "
            f"other, and batch_size is {batch_size}: give batch_size={len(largest)} (--batch-size "
            f"{len(largest)}) or more, or part them by a column 'group' beside the prompts"
        )
    return groups


def scoring_device(name: str, pictures: Media | list[Any]) -> torch.device | None:
    """Where pictures are scored.

    Args:
        name: ``auto`` leaves media where they are and takes files to a CUDA GPU where there is
            one, else to the CPU; otherwise what :func:`~mmalign.runtime.device.pick_device` takes.
    """
    if name != "auto":
        return pick_device(name)
    if isinstance(pictures, Media):
        return None
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _scored(
    model: RewardModel,
    batch: Media | PictureError,
    prompts: Sequence[str],
    context: Sequence[Mapping[str, Any]] | None,
    device: torch.device | None,
) -> Score:
    if isinstance(batch, Media):
        before = batch.data.device
        batch = batch if device is None else Media(batch.data.to(device))
        return model.score(batch, prompts, context).to(before)
    return Score.of(torch.full((1,), torch.nan), model.identity, [str(batch)])


def _keys(
    pictures: Media | list[Any],
    prompts: Sequence[str],
    context: Sequence[Mapping[str, Any]] | None,
    groups: Sequence[Sequence[int]],
) -> list[str]:
    if isinstance(pictures, Media) or not all(isinstance(p, Path) for p in pictures):
        raise ValueError("a journal recognises pictures by their files; give paths or a folder")
    facts = context or [{}] * len(pictures)
    keys = [picture_key(*row) for row in zip(pictures, prompts, facts, strict=True)]
    for group in groups:  # a score in a group is one beside these others
        beside = "".join(sorted(keys[i] for i in group))
        own = {i: hashlib.sha256(f"{keys[i]}{beside}".encode()).hexdigest()[:32] for i in group}
        for i, key in own.items():
            keys[i] = key
    return keys
