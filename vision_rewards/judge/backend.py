"""What a judge is asked through: a question about pictures, an answer, and whoever answers.

Modes of judging (rubrics, comparisons, yes / no probabilities) know only these three; whether a
network in this process or a server answers is the back-end's business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor, nn

from mmalign.pictures import read_picture, to_rgb
from mmalign.types import Media

Picture = Any  # a Pillow image or a tensor (3, H, W) in [0, 1]


class BackendError(OSError):
    """A back-end that cannot answer any question: wrong address, model, key or checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question.

    Attributes:
        text: the question; pictures come before it, in order.
        images: Pillow images or tensors ``(3, H, W)`` in [0, 1].
        system: the system message; empty for none.
        temperature: 0 takes the likeliest token; above 0 samples with ``seed``.
        max_tokens: longest answer, at least 1.
        seed: of the sampling; equal seeds give equal answers where the back-end can promise it.
        choices: words whose probability is wanted as well, such as ``("yes", "no")``.
        verdict_after: regular expression after whose last match in the answer the probabilities
            are read; empty for the first token of the answer.

    Raises:
        ValueError: a negative temperature or fewer than one token.
    """

    text: str
    images: tuple[Picture, ...] = ()
    system: str = ""
    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0
    choices: tuple[str, ...] = ()
    verdict_after: str = ""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, got {self.max_tokens}")

    def content(self) -> dict[str, Any]:
        """Everything that can change the answer, as plain data; pictures by their digest."""
        content = {k: v for k, v in vars(self).items() if k != "images"}
        content["images"] = [picture_digest(p) for p in self.images]
        if not self.temperature:  # nothing is drawn, so the seed changes nothing
            content["seed"] = 0
        return content


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer.

    Attributes:
        text: as it was generated, without special tokens.
        refused: the back-end says that the model declined to answer.
        truncated: the answer reached ``max_tokens``.
        choice_log_probs: natural log of the probability of each choice, summed over spellings;
            ``-inf`` where only the other choices were seen, ``None`` where none was.
        tokens_in, tokens_out: what the answer cost; 0 for one from a cache.
        error: why there is no answer; empty where there is one.
        cached: the answer was read from a cache.
    """

    text: str = ""
    refused: bool = False
    truncated: bool = False
    choice_log_probs: Mapping[str, float] | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    error: str = ""
    cached: bool = False


@runtime_checkable
class Backend(Protocol):
    """Whoever answers."""

    @property
    def identity(self) -> str:
        """Model, weights and every setting that changes answers."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether equal questions are promised equal answers."""
        ...

    def networks(self) -> Sequence[nn.Module]:
        """Networks in this process, to be moved to a device; none for a server."""
        ...

    def ask(self, queries: Sequence[Query]) -> list[Reply]:
        """Answer all, in order; a question that could not be answered has ``error`` set.

        Raises:
            BackendError: no question could ever be answered.
        """
        ...


def as_pil(picture: Picture, what: str = "picture") -> Image.Image:
    """An RGB Pillow image of an image, a tensor ``(3 or 1, H, W)`` in [0, 1] or a file.

    Files and images are read as everywhere (see :func:`mmalign.pictures.to_rgb`): upright, 16 bits
    scaled, transparency over white.

    Raises:
        ValueError: something else (names ``what``), or a file that is no picture.
    """
    if isinstance(picture, Image.Image):
        return picture if picture.mode == "RGB" else to_rgb(picture)
    if isinstance(picture, Tensor) and picture.ndim == 3 and picture.shape[0] in (1, 3):
        return Media(picture[None].float().expand(1, 3, *picture.shape[1:])).to_pil()[0]
    if isinstance(picture, (str, Path)):
        return read_picture(picture)
    shape = f" of shape {tuple(picture.shape)}" if isinstance(picture, Tensor) else ""
    raise ValueError(
        f"{what} must be a Pillow image, a tensor (3, H, W) in [0, 1] or a file, "
        f"got a {type(picture).__name__}{shape}"
    )


def picture_digest(picture: Picture) -> str:
    """A digest of the 8-bit pixels and the size."""
    image = as_pil(picture)
    return digest([image.size, hashlib.sha256(image.tobytes()).hexdigest()], 64)


def digest(value: Any, length: int = 10) -> str:
    """The first hexadecimal digits of the SHA-256 of plain data."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
