"""Does the picture show the words it was asked to show? Text recognition against the prompt.

The rule of Flow-GRPO (Liu et al., 2505.05470), with any recogniser's usual slips forgiven: case
and spaces do not count.  Recognition is ``rapidocr`` (PaddleOCR's models on ONNX Runtime); its
wheel holds the models, so nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmalign.registry import unknown
from mmalign.runtime.extras import optional
from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of
from vision_rewards.sharing import shared

Mode = Literal["substring", "strict"]
Fallback = Literal["unscored", "prompt"]
_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»|「([^」]*)」')
_ASPECT = 4  # longer pictures are padded to this aspect ratio
_MOST = 180_000_000  # pixels of a padded picture; text of a longer strip could not be read anyway
_SHOWN = 80  # characters of recognised text in a note


def quoted_text(prompt: str) -> str | None:
    """The first quoted span of a prompt, between straight or typographic double quotes."""
    found = _QUOTED.search(prompt)
    return None if found is None else next(g for g in found.groups() if g is not None)


def plain(text: str) -> str:
    """Lower case without white space: what counts of a text."""
    return "".join(text.lower().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(row[-1] + 1, before[j] + 1, before[j - 1] + (x != y)))
    return row[-1]


def text_reward(recognised: str, target: str, mode: Mode = "substring") -> float:
    """Agreement in [0, 1] of recognised text with the target, both through :func:`plain`.

    With ``d`` the edit distance, ``substring`` is Flow-GRPO's ``1 - min(d, |target|) / |target|``,
    where ``d`` is 0 if the target occurs anywhere in what was read; ``strict`` is
    ``1 - d / max(|recognised|, |target|)``, which other text costs.

    Raises:
        ValueError: an empty target.
    """
    read, wanted = plain(recognised), plain(target)
    if not wanted:
        raise ValueError("the text to look for is empty")
    if mode == "strict":
        return 1.0 - edit_distance(read, wanted) / max(len(read), len(wanted))
    distance = 0 if wanted in read else min(edit_distance(read, wanted), len(wanted))
    return 1.0 - distance / len(wanted)


@cache
def _engine(threads: int) -> Any:
    """The recogniser, made once a process; silent, since an empty picture is no incident."""
    package = optional("rapidocr", "ocr", "text recognition")
    options = {
        "Global.log_level": "critical",
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
    }
    return package.RapidOCR(params=options)


def recognise(picture: np.ndarray) -> str:
    """All text of an 8-bit RGB picture ``(H, W, 3)``, in reading order, joined by spaces.

    Raises:
        ValueError: a strip so thin that the picture around it would not fit in memory.
    """
    height, width = picture.shape[:2]
    area = max(height, width) ** 2 // _ASPECT
    if area > max(_MOST, height * width):
        raise ValueError(f"{width} x {height} pixels are too thin: {area:,} with their margin")
    # The detector enlarges the shorter side: a strip would become a picture of huge length.
    below, right = max(0, width // _ASPECT - height), max(0, height // _ASPECT - width)
    padded = np.pad(picture, ((0, below), (0, right), (0, 0)), mode="edge")
    found = _engine(torch.get_num_threads())(np.ascontiguousarray(padded[:, :, ::-1]))  # as BGR
    return " ".join(found.txts or ())


def _texts(picture: Tensor) -> list[str]:
    """Text of a picture ``(3, H, W)``, or of every frame of a video ``(T, 3, H, W)``."""
    frames = picture if picture.ndim == 4 else picture[None]
    array = frames.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [recognise(frame) for frame in array]


class OcrReward(PixelReward):
    """How much of the quoted text of the prompt can be read in the picture, in [0, 1].

    The text to look for is ``context["text"]`` where it is given, else the first quoted span of
    the prompt.  The part ``exact`` is 1 where nothing but that text was read. Of a video both are
    means over the frames. The note of each picture quotes what was read.

    Args:
        mode: ``substring`` (Flow-GRPO) or ``strict``; see :func:`text_reward`. The former can be
            hacked by covering the picture with text.
        fallback: without quotes, a picture is ``unscored``, or the whole ``prompt`` is the text.

    Raises:
        UnknownNameError: another mode or fallback.
        MissingExtraError: rapidocr is not installed.
    """

    info = info_of("ocr")

    def __init__(self, *, mode: Mode = "substring", fallback: Fallback = "unscored") -> None:
        super().__init__(device="cpu")
        if mode not in ("substring", "strict"):
            raise unknown("mode of the text reward", mode, ("substring", "strict"))
        if fallback not in ("unscored", "prompt"):
            raise unknown("fallback of the text reward", fallback, ("unscored", "prompt"))
        self.mode, self.fallback = mode, fallback
        optional("rapidocr", "ocr", f"reward {self.info.name!r}")

    @property
    def identity(self) -> str:
        """Name, rule, and the recogniser's version, which fixes its models."""
        from importlib.metadata import version

        rule = self.mode if self.fallback == "unscored" else f"{self.mode}-or-prompt"
        return f"{self.info.name}@{rule}-rapidocr-{version('rapidocr')}"

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Recognise and compare, picture by picture."""
        # What was read off a row, kept for another text reward on the same pictures.
        known: dict[int, list[str]] = shared(("rapidocr",), pixels, dict)
        rows = zip(prompts, context, strict=True)
        read = [self._read_one(pixels, i, known, *row) for i, row in enumerate(rows)]
        values, exact, notes = zip(*read, strict=True)
        return Reading(torch.tensor(values), {"exact": torch.tensor(exact)}, notes)

    def _read_one(
        self,
        pixels: Tensor,
        row: int,
        known: dict[int, list[str]],
        prompt: str,
        facts: Mapping[str, Any],
    ) -> tuple[float, float, str]:
        target = facts.get("text", quoted_text(prompt))
        if target is None and self.fallback == "prompt":
            target = prompt
        if target is None or not plain(str(target)):
            said = "no text in quotes" if target is None else "an empty text"
            return torch.nan, torch.nan, f'the prompt asks for {said}; write it as "text"'
        try:
            texts = known[row] = known.get(row) or _texts(pixels[row])
        except Exception as error:  # one odd picture must not take its batch along
            return torch.nan, torch.nan, f"text recognition failed: {type(error).__name__}: {error}"
        values = [text_reward(text, str(target), self.mode) for text in texts]
        exact = [float(plain(text) == plain(str(target))) for text in texts]
        said = " | ".join(dict.fromkeys(texts))[:_SHOWN]
        return sum(values) / len(values), sum(exact) / len(exact), f"read {said!r}"


class StrictOcrReward(OcrReward):
    """:class:`OcrReward` under the strict rule: text that was not asked for costs."""

    info = info_of("ocr_strict")

    def __init__(self, *, fallback: Fallback = "unscored") -> None:
        super().__init__(mode="strict", fallback=fallback)
