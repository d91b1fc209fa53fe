"""Where the pictures of an evaluation come from: a generator, or a folder of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image

from eval.clips import Clip, pictures_of, read_clip
from eval.layouts import Cell
from mmalign.pictures import DECODERS, PictureError
from mmalign.protocols import Policy, Request
from mmalign.types import Media, MediaKind


@dataclass(frozen=True)
class Made:
    """One picture or video: as 8-bit RGB, or why there is none; possibly the file it is in."""

    image: Image | Clip | None
    reason: str = ""
    file: Path | None = None


class Source(Protocol):
    """Makes pictures for requests."""

    def __call__(self, batch: Sequence[Request]) -> tuple[list[Made], float]:
        """A picture for each request, and the network evaluations they took."""
        ...


class Generate(Protocol):
    """Deterministic sampling: media of ``B`` prompts and the network evaluations spent."""

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Media, int]: ...


@dataclass(frozen=True)
class Generated:
    """Pictures that a policy makes.

    With ``pin`` the network always sees that many pictures at once, the last call filled up with
    repeats. A matrix product of another size may round otherwise; of one size, a row does not
    depend on the others, so the batch size no longer shows in the pictures.
    """

    policy: Policy
    generate: Generate
    settings: Mapping[str, Any]
    dtype: torch.dtype | None = None
    pin: int | None = None
    kind: MediaKind = "image"

    @torch.no_grad()
    def __call__(self, batch: Sequence[Request]) -> tuple[list[Made], float]:
        """Generated, rounded to 8 bits; what holds NaN is a picture with a reason."""
        size = self.pin or len(batch)
        parts = [self._call(batch[a : a + size], size) for a in range(0, len(batch), size)]
        media = Media.cat([m for m, _ in parts])
        whole = torch.isfinite(media.data).flatten(1).all(1).tolist()
        said = "the picture holds NaN or infinite values"  # 8 bits would make black of them
        made = [
            Made(i, "" if ok else said) for i, ok in zip(pictures_of(media), whole, strict=True)
        ]
        return made, sum(nfe for _, nfe in parts)

    def _call(self, batch: Sequence[Request], size: int) -> tuple[Media, float]:
        rows = [*batch, *[batch[-1]] * (size - len(batch))] if self.pin else batch
        media, nfe = self.generate(
            self.policy,
            [r.prompt for r in rows],
            [r.seed for r in rows],
            steps=self.settings["steps"],
            guidance_scale=self.settings["guidance_scale"],
            **({} if self.dtype is None else {"dtype": self.dtype}),
        )
        if len(media) != len(rows):
            raise ValueError(f"asked for {len(rows)} pictures, generated {len(media)}")
        if media.kind != self.kind:
            name = self.settings["benchmark"]
            raise ValueError(f"{name} judges {self.kind}s, the policy made a {media.kind}")
        # Repeats are rounding's price, not the picture's: a result is the same in any batch size.
        return media[: len(batch)], nfe * len(batch) / len(rows)


@dataclass(frozen=True)
class Existing:
    """Pictures that are there already, decoded by a few threads."""

    cells: Mapping[str, Cell]
    kind: MediaKind = "image"

    def __call__(self, batch: Sequence[Request]) -> tuple[list[Made], float]:
        """Pictures as they are; what is missing or damaged is a reason."""
        with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), "decode") as pool:
            return list(pool.map(self._open, batch)), 0.0

    def _open(self, request: Request) -> Made:
        cell = self.cells.get(request.key)
        if cell is None:
            return Made(None, "missing: there is no such picture")
        file = cell.path if cell.part is None else None  # a cell becomes a file of its own
        try:
            whole = read_clip(cell.path) if self.kind == "video" else cell.open()
            return Made(whole, file=file)
        except PictureError as error:
            return Made(None, str(error))
