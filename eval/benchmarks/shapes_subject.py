"""Does a generator draw one particular object, and what else was asked for? On the shapes world.

A subject (:mod:`mmalign.shapes.subject`) is an object in two colours, its ground and a pattern on
it.  Where these colours lie in a picture, gaps between them closed, the picture is painted in the
ground alone; the strict verifier of the world then judges it by the prompt with the ground's colour
in the place of the token.  The texture is judged apart: the pattern's share of the two colours has
to lie between :data:`SHARES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.benchmarks.base import Numbers, part_mean
from eval.benchmarks.shapes import check_limit, request_seed
from eval.result import Row
from mmalign.protocols import Request
from mmalign.shapes.grammar import COLORS
from mmalign.shapes.segments import Segments
from mmalign.shapes.subject import SCHEME, TOKEN, subject_of, subject_prompts
from mmalign.types import Media, Score
from vision_rewards.shapes import ShapesStrict

SHARES = (0.2, 0.8)  # of the pattern; 0.36 to 0.63 where nothing else has its colour
CLOSING = 5 / 64  # pixels across gaps between the colours, in sides of the picture


class ShapesSubject:
    """Prompts with a subject beside another object, whose colour is named and none of its own.

    Args:
        subject: a name of :data:`mmalign.shapes.subject.SUBJECTS`.
        split: ``train``, ``validation`` or ``test``.
        prompts_per_task: distinct prompts at most; there is one task.
        samples_per_prompt: pictures of each prompt.
        token: the word by which the generator knows the subject.

    Raises:
        UnknownNameError: no such subject. ValueError: a size below 1, or no prompt in the split.
    """

    name = "shapes_subject"
    version = "2"
    keeps_parts = True

    def __init__(
        self,
        split: str = "test",
        prompts_per_task: int = 40,
        samples_per_prompt: int = 4,
        subject: str = "halved_triangle",
        token: str = TOKEN,
    ) -> None:
        if min(prompts_per_task, samples_per_prompt) < 1:
            raise ValueError(
                f"prompts_per_task is {prompts_per_task} and samples_per_prompt "
                f"{samples_per_prompt}; both must be 1 or more"
            )
        self.options: dict[str, Any] = {
            "split": split, "prompts_per_task": prompts_per_task,
            "samples_per_prompt": samples_per_prompt, "subject": subject, "token": token,
        }  # fmt: skip
        found = subject_of(subject)
        self._ground = found.color
        self._pattern = next(n for n, rgb in COLORS.items() if rgb == found.pattern.rgb)
        every = subject_prompts(SCHEME + subject, split)
        # Another object of any colour could have the subject's and be taken for part of it.
        named = set(COLORS) - {self._ground, self._pattern}
        mine = [p for p in every if named & set(p.split())]
        if not mine:
            raise ValueError(f"split {split!r} has no prompt with {subject}")
        self._prompts = mine[:prompts_per_task]
        self._segments = Segments()

    @property
    def identity(self) -> str:
        """The verifier, and the segmentation that finds the texture."""
        return f"{self._strict.identity}, {self._segments.identity}"

    def requests(self, limit: int | None = None) -> list[Request]:
        """All prompts once, then all again; a limit keeps the first."""
        check_limit(limit)
        count = self.options["samples_per_prompt"]
        rows = [self._request(n, k) for k in range(count) for n in range(len(self._prompts))]
        return rows[:limit]

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """1 where the texture is there and, without it, everything that was asked for.

        The parts ``texture`` and ``composition`` are the two, ``pattern`` is the pattern's share.
        """
        pixels = media.data.float()
        labels = self._segments.labels(pixels)
        ground, pattern = (labels == self._class(c) for c in (self._ground, self._pattern))
        own = (ground | pattern).flatten(1).sum(1)
        share = pattern.flatten(1).sum(1) / own.clamp_min(1)
        texture = (share > SHARES[0]) & (share < SHARES[1])
        plain = Media(self._painted(pixels, ground | pattern))
        read = self._strict.score(plain, [self._plain(r.prompt) for r in requests])
        composed = torch.where(read.valid, read.value, torch.nan)
        parts = {"texture": texture.float(), "composition": composed, "pattern": share.float()}
        value = torch.where(texture, composed, torch.where(read.valid, 0.0, torch.nan))
        return Score(value, read.valid, parts, read.notes, self.identity)

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """How often the texture was there, and how often all but it."""
        return {name: part_mean(rows, name) for name in ("texture", "composition")}

    def _painted(self, pixels: Tensor, own: Tensor) -> Tensor:
        """Pictures with one colour where the subject's are, and between them."""
        across = 2 * round(CLOSING * pixels.shape[-1] / 2) + 1
        grown = F.max_pool2d(own.float().unsqueeze(1), across, 1, across // 2)
        closed = -F.max_pool2d(-grown, across, 1, across // 2) > 0
        color = pixels.new_tensor(COLORS[self._ground]).view(1, 3, 1, 1) / 255
        return torch.where(closed, color, pixels)

    def _plain(self, prompt: str) -> str:
        token = self.options["token"]
        return prompt.replace(f" {token} ", f" {self._ground} ", 1)

    def _class(self, color: str) -> int:
        return 1 + list(COLORS).index(color)

    def _request(self, which: int, sample: int) -> Request:
        subject = self.options["subject"]
        known, token = self._prompts[which], self.options["token"]
        prompt = known.replace(f" {TOKEN} ", f" {token} ", 1)
        seed = request_seed(self.name, self.version, known, sample)
        return Request(
            key=f"{which:03d}-{sample:02d}", prompt=prompt, task=subject, sample=sample, seed=seed
        )

    @cached_property
    def _strict(self) -> ShapesStrict:
        return ShapesStrict()
