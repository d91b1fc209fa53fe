"""What all modes of judging share: where answers come from, asking again, unscored samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.protocols import Review
from mmalign.types import Media, Score
from vision_rewards.base import PixelReward, Reading
from vision_rewards.judge.backend import Backend, Query, Reply, as_pil, digest
from vision_rewards.judge.cache import CachedBackend
from vision_rewards.judge.parsing import (
    UnreadableError,
    looks_refused,
    tagged,
    without_thoughts,
)
from vision_rewards.judge.templates import Template, load_template, quoted

T = TypeVar("T")
LONGEST_NOTE = 2000  # characters of a raw answer that a note keeps


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What was read from the answers to one question.

    Attributes:
        value: what was read; ``None`` where nothing could be.
        reason: why nothing could be read, with the raw text; empty otherwise.
        text: the last raw answer.
        asked: how often the question was asked.
    """

    value: T | None
    reason: str = ""
    text: str = ""
    asked: int = 1


@dataclass(frozen=True)
class Row:
    """One sample's score: NaN where it could not be judged."""

    value: float = math.nan
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


class JudgeReward(PixelReward):
    """Base of judges: implement :meth:`judge` and set ``info``.

    Args:
        checkpoint: hub name or folder of a vision-language model; ``None`` takes the published
            default. Ignored with ``backend`` or ``url``.
        backend: whoever answers, instead of a checkpoint.
        url: an OpenAI-compatible server, ``http://localhost:8000/v1``, instead of a checkpoint.
        model: the model's name on that server; defaults to the checkpoint's.
        server: further options of :class:`~vision_rewards.judge.server.OpenAIBackend`.
        cache: folder for answers; ``None`` keeps none.
        device: where a local model lives; ``None`` follows the media.
        dtype: precision of a local model: ``auto`` (as stored), ``fp32``, ``bf16``, ``fp16``.
        batch_size: questions a local model answers at once.
        temperature, seed: of the answers; 0 takes the likeliest token.
        max_tokens: longest answer; ``None`` takes the mode's own.
        reasks: how often an unreadable answer is asked for again.
        size: side that pictures are resized to before they are sent; ``None`` sends them as
            they are.
        template: a shipped template's name, or a text file, instead of the mode's own.

    Raises:
        OSError: the checkpoint cannot be loaded.
        ValueError: contradicting or impossible options.
    """

    template_name = ""
    default_max_tokens = 1024
    default_size: int | None = None

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        backend: Backend | None = None,
        url: str | None = None,
        model: str | None = None,
        server: Mapping[str, Any] | None = None,
        cache: str | Path | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int = 8,
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int | None = None,
        reasks: int = 2,
        size: int | None = None,
        template: str | Path | None = None,
    ) -> None:
        super().__init__(device)
        if reasks < 0:
            raise ValueError(f"reasks must be 0 or more, got {reasks}")
        self.template: Template = load_template(template or self.template_name)
        self.temperature, self.seed, self.reasks = temperature, seed, reasks
        self.max_tokens = max_tokens or self.default_max_tokens
        self.size = size or self.default_size
        if backend is None:
            source = str(checkpoint or self.info.checkpoint)
            if url is None:
                _refuse_server_options(model, server)
                backend = _local(source, dtype, batch_size)
            else:
                backend = _server(url, model or source, server or {})
        elif url is not None or checkpoint is not None:
            raise ValueError("give one of checkpoint, url and backend")
        self.backend = backend if cache is None else CachedBackend(backend, cache)
        promised = self.info.deterministic and self.backend.deterministic
        self.info = replace(self.info, deterministic=promised)

    @property
    def identity(self) -> str:
        """Name, back-end, and a digest of templates and settings."""
        settings = digest({k: str(v) for k, v in self.settings().items()})
        return f"{self.info.name}@{self.backend.identity}-{settings}"

    def settings(self) -> dict[str, Any]:
        """What changes scores besides the back-end."""
        return {
            "template": self.template.fingerprint,
            "temperature": self.temperature,
            "seed": self.seed if self.temperature else 0,
            "max_tokens": self.max_tokens,
            "reasks": self.reasks,
            "size": self.size,
        }

    def networks(self) -> Sequence[nn.Module]:
        """The back-end's networks in this process."""
        return self.backend.networks()

    def resampled(self, seed: int, temperature: float) -> JudgeReward:
        """The same judge on the same back-end, answering with another seed and temperature."""
        other = copy.copy(self)
        other.seed, other.temperature = seed, temperature
        return other

    def judge(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]],
    ) -> list[Row]:
        """Judge Pillow pictures, one row for each."""
        raise NotImplementedError

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Any) -> Reading:
        """Judge pixels ``(B, 3, H, W)``; parts are those of the rows, NaN where one lacks them."""
        pictures = [self.fitted(p) for p in Media(pixels).to_pil()]
        return reading_of(self.judge(pictures, prompts, context))

    def review(self, media: Media, prompts: Sequence[str]) -> tuple[Score, Sequence[Review | None]]:
        """Score pictures, and ask how each prompt should be worded for a better one.

        The critique is what the score's note says. ``None`` where the picture was not scored or
        no wording could be read.
        """
        score = self.score(media, prompts)
        rows = torch.nonzero(score.valid).flatten().tolist()
        shown = [self.fitted(p) for p in media[rows].to_pil()] if rows else []
        notes = [score.notes[i] if score.notes else "" for i in rows]
        template = load_template("refine")
        queries = [
            self.query(template.fill(prompt=quoted(prompts[i]), critique=note or "none"), [picture])
            for i, note, picture in zip(rows, notes, shown, strict=True)
        ]
        reviews: list[Review | None] = [None] * len(media)
        for i, note, answer in zip(rows, notes, self.ask(queries, read_refined), strict=True):
            if answer.value is not None:
                parts = {n: float(p[i]) for n, p in score.parts.items()}
                scores = {n: None if math.isnan(v) else v for n, v in parts.items()}
                reviews[i] = Review(scores, note, answer.value)
        return score, reviews

    def fitted(self, picture: Any, what: str = "picture") -> Image.Image:
        """A picture as it is sent: RGB, resized to a square where ``size`` asks for one."""
        image = as_pil(picture, what)
        if self.size is None or image.size == (self.size, self.size):
            return image
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def query(self, text: str, images: Sequence[Image.Image], **changes: Any) -> Query:
        """A question with this judge's settings."""
        common = {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        return Query(text=text, images=tuple(images), **(common | changes))

    def ask(self, queries: Sequence[Query], parse: Callable[[Reply], T]) -> list[Answer[T]]:
        """Ask, and ask again (at most ``reasks`` times) where ``parse`` cannot read the answer.

        ``parse`` raises :class:`UnreadableError`. Refusals and failures of the back-end are not
        asked again: the one would be refused again, the other has been retried.
        """
        answers: list[Answer[T]] = [Answer(None)] * len(queries)
        pending = dict(enumerate(queries))
        for attempt in range(self.reasks + 1):
            replies = self.backend.ask(list(pending.values())) if pending else []
            again = {}
            for i, reply in zip(list(pending), replies, strict=True):
                answers[i], why = _read_answer(reply, parse, attempt + 1)
                if why:
                    again[i] = _asked_again(queries[i], why, attempt + 1)
            pending = again
        return answers


def reading_of(rows: Sequence[Row]) -> Reading:
    """Rows as one reading; parts are NaN where a row lacks them."""
    names = list(dict.fromkeys(n for row in rows for n in row.parts))
    parts = {n: torch.tensor([row.parts.get(n, math.nan) for row in rows]) for n in names}
    value = torch.tensor([row.value for row in rows])
    return Reading(value, parts, [row.note for row in rows])


def read_refined(reply: Reply) -> str:
    """The wording in an answer to the template ``refine``.

    Raises:
        UnreadableError: there is none, or it is empty.
    """
    text = tagged(without_thoughts(reply.text), "prompt")
    if not text:
        raise UnreadableError("its <prompt> is empty")
    return " ".join(text.split())


def _read_answer(reply: Reply, parse: Callable[[Reply], T], asked: int) -> tuple[Answer[T], str]:
    """The answer, and what to complain about where asking again may help."""
    raw = reply.text[:LONGEST_NOTE]
    if reply.error:
        return Answer(None, f"the judge did not answer: {reply.error}", raw, asked), ""
    if reply.refused:
        return Answer(None, f"the judge refused; it said: {raw!r}", raw, asked), ""
    try:
        return Answer(parse(reply), "", reply.text, asked), ""
    except UnreadableError as error:
        if looks_refused(reply.text):
            return Answer(None, f"the judge refused; it said: {raw!r}", raw, asked), ""
        cut = " (cut off at max_tokens)" if reply.truncated else ""
        times = f"{asked} answer{'s' if asked > 1 else ''}"
        reason = f"unreadable after {times}{cut}: {error}; the last one was: {raw!r}"
        return Answer(None, reason, raw, asked), str(error)


def _asked_again(query: Query, why: str, attempt: int) -> Query:
    text = (
        f"{query.text}\n\nAn earlier answer could not be used because {why}. "
        "Answer again, in exactly the form asked for."
    )
    return replace(query, text=text, seed=query.seed + 1000 * attempt)


def _refuse_server_options(model: str | None, server: Mapping[str, Any] | None) -> None:
    if model is not None or server:
        raise ValueError("model and server belong to a server: give its url as well")


def _local(checkpoint: str, dtype: str, batch_size: int) -> Backend:
    from vision_rewards.judge.local import LocalBackend

    return LocalBackend(checkpoint, dtype=dtype, batch_size=batch_size)


def _server(url: str, model: str, options: Mapping[str, Any]) -> Backend:
    from vision_rewards.judge.server import OpenAIBackend

    return OpenAIBackend(url, model, **options)
