"""GenEval (Ghosh et al., 2310.11513) as a reward: detect objects, apply the benchmark's rules.

What a picture has to show comes from ``context["geneval"]`` (a line of the benchmark's metadata) or
is read back from the prompt.  The rules are in :mod:`vision_rewards.geneval_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.registry import unknown
from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of
from vision_rewards.geneval_models import ColorClassifier, Detector, Found
from vision_rewards.geneval_prompts import GenEvalPromptError, parse_prompt
from vision_rewards.geneval_rules import ColorOf, Detection, Requirement, judge, partial

MODES = ("official", "strict", "partial")
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COLOR_CLIP = "ViT-L-14/openai"
VERSION = "1"  # part of the identity: a changed rule is a changed version


class GenEval(PixelReward):
    """Does the picture show what the prompt asks for: 0 or 1, or graded credit.

    ``parts`` hold all three modes; ``notes`` say what is wrong.  Unscored are prompts outside the
    benchmark's grammar, and classes that the detector does not know.

    Args:
        checkpoint: an object detector or Mask2Former of transformers, hub name or folder.
        mode: which part is the value: ``official``, ``strict`` or ``partial``.
        colors: CLIP for colours, see :func:`vision_rewards.embedding.load_embedder`; ``None``
            does without, and leaves unscored what asks for a colour.
        threshold: least confidence of a detection, exclusive.
        counting_threshold: the same for the task ``counting``.
        max_objects: detections kept of each class, most confident first.
        floor, compat: of partial credit, see :func:`vision_rewards.geneval_rules.partial`.
        batch_size: pictures of one forward pass of the detector.
        device: see :class:`PixelReward`.

    Raises:
        OSError: a checkpoint is not there and cannot be fetched.
        ValueError: an unknown mode, or a checkpoint that is no detector.
    """

    info = info_of("geneval")

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        mode: str = "official",
        colors: str | Path | None = COLOR_CLIP,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        floor: float | None = 0.0,
        compat: str = "",
        batch_size: int = 8,
        device: str | None = None,
    ) -> None:
        super().__init__(device)
        for kind, name, known in (("mode", mode, MODES), ("compat", compat, ("", "port"))):
            if name not in known:
                raise unknown(f"GenEval {kind}", name, known)
        self.mode, self.max_objects = mode, max_objects
        self.thresholds = (threshold, counting_threshold)
        self.credit: dict[str, Any] = {"floor": floor, "compat": compat}
        if mode == "partial" and floor is None:  # superfluous objects count without limit
            self.info = replace(self.info, range=(None, 1.0))
        lowest = min(self.thresholds)
        self.detector = Detector(checkpoint or DETECTOR, floor=lowest, batch_size=batch_size)
        self.colors = None if colors is None else ColorClassifier(colors)

    @property
    def identity(self) -> str:
        """Rules, digests of both networks and every setting."""
        colors = self.colors.digest if self.colors else "no-colors"
        settings = (*self.thresholds, self.max_objects, *self.credit.values())
        said = "-".join(str(s) for s in settings if s != "")
        return f"geneval-{self.mode}@{VERSION}-{self.detector.digest}-{colors}-{said}"

    def networks(self) -> Sequence[nn.Module]:
        """The detector and CLIP's towers."""
        return (self.detector.model, *(self.colors.networks if self.colors else ()))

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Judge pixels ``(B, 3, H, W)``, rounded to 8 bits as the benchmark's files are.

        Raises:
            ValueError: ``context["geneval"]`` is no usable requirement.
        """
        pixels = pixels.clamp(0, 1).mul(255).round().div(255)
        asked = [self._requirement(p, c) for p, c in zip(prompts, context, strict=True)]
        rows = [k for k, a in enumerate(asked) if isinstance(a, Requirement)]
        columns = {mode: [math.nan] * len(pixels) for mode in MODES}
        notes = ["" if isinstance(a, Requirement) else a for a in asked]
        found = self.detector(pixels[rows]) if rows else []
        for k, objects in zip(rows, found, strict=True):
            wanted = asked[k]
            assert isinstance(wanted, Requirement)
            grades, notes[k] = self._judge(pixels[k], objects, wanted)
            for mode, grade in grades.items():
                columns[mode][k] = grade
        parts = {m: torch.tensor(c, dtype=torch.float32) for m, c in columns.items()}
        return Reading(parts[self.mode], parts, notes)

    def _requirement(self, prompt: str, context: Mapping[str, Any]) -> Requirement | str:
        """What is asked for, or why that cannot be told."""
        given = context.get("geneval")
        try:
            if given is None:
                wanted = parse_prompt(prompt, self.detector.classes)
            else:
                wanted = given if isinstance(given, Requirement) else Requirement.of(given)
        except GenEvalPromptError as error:
            return str(error)
        strange = [c for c in wanted.classes if c not in self.detector.classes]
        if strange:
            return f"the detector does not know {', '.join(map(repr, strange))}"
        if self.colors is None and any(c.color for c in wanted.include):
            return "a colour is asked for, and no model for colours was given (colors=None)"
        return wanted

    def _judge(
        self, picture: Tensor, found: Found, wanted: Requirement
    ) -> tuple[dict[str, float], str]:
        """All three grades, and what is wrong by the rules of the mode."""
        objects = self._confident(found, wanted)
        color_of = self._color_of(picture)
        verdicts = {
            mode: judge(objects, wanted, color_of, exact=mode == "strict")
            for mode in ("official", "strict")
        }
        grades = {mode: float(verdict.passed) for mode, verdict in verdicts.items()}
        grades["partial"] = math.nan
        if wanted.include:
            grades["partial"] = partial(objects, wanted, color_of, **self.credit)
        told = verdicts["official" if self.mode == "official" else "strict"]
        return grades, "; ".join(told.reasons)

    def _confident(self, found: Found, wanted: Requirement) -> dict[str, list[Detection]]:
        threshold = self.thresholds[wanted.tag == "counting"]
        return {
            name: [one for one in objects if one.score > threshold][: self.max_objects]
            for name, objects in found.items()
        }

    def _color_of(self, picture: Tensor) -> ColorOf:
        """The colours of objects in ``picture``, each looked at once for all three modes."""
        known: dict[tuple[str, int], str] = {}

        def color_of(name: str, objects: Sequence[Detection]) -> list[str]:
            new = [one for one in objects if (name, id(one)) not in known]
            if new and self.colors is not None:
                told = self.colors(picture, name, new)
                known.update(((name, id(o)), c) for o, c in zip(new, told, strict=True))
            return [known[name, id(one)] for one in objects]

        return color_of
