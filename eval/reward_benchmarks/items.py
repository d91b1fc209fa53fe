"""What a reward benchmark is made of: candidates, what people said of them, what a reward says."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmalign.pictures import PictureError, read_picture, to_rgb

Form = Literal["pair", "ranking", "rating", "best"]
Source = Path | bytes | Callable[[], Image.Image] | None


@dataclass(frozen=True)
class Candidate:
    """One picture, video or answer that is judged.

    Attributes:
        key: what tells it from others; equal keys are scored once.
        source: a file, the bytes of one, or a function that makes the picture; ``None`` for text.
        text: an answer in words, where that is what is judged.
        maker: the model it comes from, where known.
        size: width and height it is resized to (bicubic) before it is judged.
        place: where it was found, for messages.
    """

    key: str
    source: Source = None
    text: str = ""
    maker: str = ""
    size: tuple[int, int] | None = None
    place: str = ""

    @property
    def id(self) -> str:
        """The key with the size it is judged at."""
        return self.key if self.size is None else f"{self.key}@{self.size[0]}x{self.size[1]}"

    def open(self) -> Image.Image:
        """The picture as upright 8-bit RGB.

        Raises:
            PictureError: it cannot be read; the message names it.
        """
        if isinstance(self.source, Path):
            image = read_picture(self.source)
        else:
            try:
                image = to_rgb(self._decoded())
            except Exception as error:  # decoders of damaged files raise nearly anything
                where = self.place or self.key
                raise PictureError(f"{where}: {type(error).__name__}: {error}") from error
        if self.size is None or image.size == self.size:
            return image
        return image.resize(self.size, Image.Resampling.BICUBIC)

    def _decoded(self) -> Image.Image:
        if isinstance(self.source, bytes):
            return Image.open(io.BytesIO(self.source))
        if not callable(self.source):
            raise PictureError("there is no picture, only text")
        return self.source()


def file_candidate(path: Path, root: Path, maker: str = "") -> Candidate:
    """A candidate in a file; recognised by its name below ``root``, size and time of change."""
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    try:
        state = path.stat()
        key = f"{name} {state.st_size} {state.st_mtime_ns}"
    except OSError:  # it is not there: scoring says so
        key = f"{name} missing"
    return Candidate(key, path, maker=maker)


def bytes_candidate(data: bytes, maker: str = "") -> Candidate:
    """A candidate in memory, recognised by its digest."""
    return Candidate(hashlib.sha256(data).hexdigest()[:32], data, maker=maker)


def text_candidate(text: str, maker: str = "") -> Candidate:
    """An answer in words, recognised by its digest."""
    return Candidate(hashlib.sha256(text.encode()).hexdigest()[:32], None, text, maker)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a benchmark.

    Attributes:
        key: distinct within the benchmark.
        prompt: what was asked for.
        candidates: two of a pair, all of a ranking or of a choice, one of a rating.
        truth: one number a candidate, higher is better; equal numbers are a tie. A tie of a pair
            is ``(1, 1)`` where both are good, ``(0, 0)`` where both are bad, else ``(0.5, 0.5)``.
        form: how ``truth`` is to be read.
        category: the part of the benchmark it belongs to.
        dimension: what was judged, where there are several; a reward's part of this name answers.
        question: items of one question belong together (ACC+); the key by default.
        cluster: items that are not independent, the prompt by default.
        context: further facts; candidates among them are opened when they are needed.
    """

    key: str
    prompt: str
    candidates: tuple[Candidate, ...]
    truth: tuple[float, ...]
    form: Form = "pair"
    category: str = "all"
    dimension: str = "overall"
    question: str = ""
    cluster: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needed = {"pair": 2, "rating": 1}.get(self.form)
        count = len(self.candidates)
        if len(self.truth) != count or (needed is not None and count != needed) or not count:
            raise ValueError(f"item {self.key!r}: {len(self.truth)} labels, {count} candidates")

    @property
    def unit(self) -> str:
        """What is resampled."""
        return self.cluster or self.prompt

    @property
    def human(self) -> int:
        """1, 0 or -1: whom people prefer in a pair."""
        first, second = self.truth
        return (first > second) - (first < second)

    @property
    def facts(self) -> str:
        """The context as text, candidates by what they are."""
        return ", ".join(f"{k}={_said(v)}" for k, v in sorted(self.context.items()))


def _said(value: Any) -> str:
    if isinstance(value, Candidate):
        return value.id
    if isinstance(value, tuple):
        return " ".join(map(_said, value))
    return repr(value)


@dataclass(frozen=True)
class Judged:
    """An item and what a reward says of it.

    Attributes:
        item: see there.
        scores: one a candidate, NaN where it could not be scored. Of comparisons the preference
            for the candidate (mean over those it was in).
        orders: of each comparison the preference for the same candidate shown first, and second.
        parts: counts that came with the scores, such as votes.
        note: why something could not be scored.
    """

    item: Item
    scores: tuple[float, ...]
    orders: tuple[tuple[float, float], ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def scored(self) -> bool:
        """Whether every candidate has a score."""
        return all(math.isfinite(s) for s in self.scores)

    @property
    def difference(self) -> float:
        """Score of the first of a pair minus that of the second."""
        return self.scores[0] - self.scores[1]
