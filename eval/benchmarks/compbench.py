"""T2I-CompBench and ++ (Huang et al. 2023, 2307.06350): attributes, positions, numbers, actions.

| category | score of a picture |
| --- | --- |
| color, shape, texture | B-VQA: product over the prompt's phrases of the probability of yes |
| spatial, numeracy | objects found by a detector, rules of :mod:`eval.benchmarks.compbench_rules` |
| 3d_spatial | the same with a depth map, rules of :mod:`eval.benchmarks.compbench_depth` |
| non_spatial | CLIPScore of ViT-B/32 |
| complex | 3-in-1: the mean of those of these three that the prompt holds |

The number of a category is the mean over its pictures. The published networks are BLIP-VQA,
UniDet and DPT-Hybrid; others give other numbers. ``fixed`` scores positions by boxes (and depth)
alone, see the rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.benchmarks.base import (
    DataError,
    Numbers,
    Prompt,
    PromptBenchmark,
    Rows,
    grouped,
    mean,
)
from eval.benchmarks.compbench_depth import (
    PUBLISHED,
    DepthEstimator,
    checked_nearer,
    depth_request,
    depth_score,
)
from eval.benchmarks.compbench_rules import (
    SIDE,
    PhraseError,
    numeracy_request,
    numeracy_score,
    phrases_of,
    spatial_request,
    spatial_score,
    three_in_one,
)
from eval.benchmarks.questions import ask_questions
from eval.benchmarks.tables import lines_of
from eval.result import Row
from mmalign.protocols import Request, RewardModel
from mmalign.registry import unknown
from mmalign.runtime.device import pick_device
from mmalign.types import Media, Score
from vision_rewards.geneval_models import Detector, Found

ATTRIBUTES = ("color", "shape", "texture")
CATEGORIES = (*ATTRIBUTES, "spatial", "non_spatial", "complex", "3d_spatial", "numeracy")
OBJECTS = ("spatial", "3d_spatial", "numeracy")
PARSERS = ("spacy", "split")


class T2ICompBench(PromptBenchmark):
    """300 validation prompts a category, ten pictures each; ``data`` is the folder of lists.

    Args:
        categories: which; ``None`` takes all whose file is there.
        detector: checkpoint of the object detector; ``None`` takes a published Mask2Former on
            COCO. Prompts with things that it does not know are unscored.
        depth: checkpoint of the depth estimation of ``3d_spatial``; ``None`` takes the published
            DPT-Hybrid.
        depth_nearer: what its near places have, ``large`` or ``small`` values; ``None`` goes by the
            kind of model.
        clip: reward of ``non_spatial``; any that compares picture and text.
        phrases: ``spacy`` or ``split``, see :func:`~eval.benchmarks.compbench_rules.phrases_of`.
        threshold: least confidence of a detection, exclusive.
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`; ``reward``
            answers B-VQA's questions.
    """

    name = "t2i_compbench"
    version = "1"
    files = "the folder with color_val.txt, shape_val.txt, ..."
    samples = 10
    reward_spec = "vqascore"
    keeps_parts = True
    layout = "t2i_compbench"

    def __init__(
        self,
        data: str | Path | None = None,
        *,
        categories: Sequence[str] | None = None,
        detector: str | Path | None = None,
        depth: str | Path | None = None,
        depth_nearer: str | None = None,
        clip: Any = None,
        phrases: str = "spacy",
        threshold: float = 0.3,
        **common: Any,
    ) -> None:
        for category in categories or ():
            if category not in CATEGORIES:
                raise unknown("category of t2i_compbench", category, CATEGORIES)
        if phrases not in PARSERS:
            raise unknown("parser of phrases", phrases, PARSERS)
        self.categories, self.phrases, self.threshold = categories, phrases, threshold
        self._detector, self._clip = detector, clip
        self._depth, self._nearer = depth or PUBLISHED, checked_nearer(depth_nearer)
        super().__init__(data, **common)

    def settings(self) -> dict[str, Any]:
        """How phrases are found, and the confidence that a detection needs."""
        return {"phrases": self.phrases, "threshold": self.threshold}

    # --- prompts --------------------------------------------------------------------------------

    def rows(self) -> Rows:
        """One prompt for each line of each category."""
        for category in self.categories or CATEGORIES:
            path = self.data / f"{category}_val.txt"
            if not path.is_file():
                if self.categories:
                    raise DataError(f"{self.data} has no {path.name}")
                continue
            for index, (where, text) in enumerate(lines_of(path)):
                yield where, lambda c=category, k=index, t=text: _prompt(c, k, t)  # type: ignore[misc]

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """What a complex prompt holds, by its text up to the first full stop."""
        kinds: dict[str, str] = {}
        for kind in ("action", "spatial"):  # a prompt in both lists counts as spatial
            path = self.data / f"complex_val_{kind}.txt"
            if not path.is_file():
                raise DataError(f"category complex needs {path.name} in {self.data}")
            kinds |= {_first_sentence(text): kind for _, text in lines_of(path)}
        return kinds

    # --- networks -------------------------------------------------------------------------------

    @cached_property
    def detector(self) -> Detector:
        """The object detector, loaded at the first prompt that needs it."""
        from vision_rewards.geneval import DETECTOR

        found = Detector(self._detector or DETECTOR, floor=self.threshold)
        found.model.to(pick_device(self._device))
        return found

    @cached_property
    def depth(self) -> DepthEstimator:
        """The depth estimation, loaded at the first prompt that needs it."""
        found = DepthEstimator(self._depth, nearer=self._nearer)
        found.model.to(pick_device(self._device))
        return found

    @cached_property
    def clip(self) -> RewardModel:
        """What compares picture and text."""
        from vision_rewards.factory import load_reward

        published = {"reward": "clip_score", "checkpoint": "openai/clip-vit-base-patch32"}
        return load_reward(self._clip or published)

    @property
    def identity(self) -> str:
        """Every network that the categories need."""
        used = {p.task for p in self.loaded.prompts}
        said = []
        if used & {*ATTRIBUTES, "complex"}:
            said.append(self.reward.identity)
        if used & {*OBJECTS, "complex"}:
            said.append(f"detector-{self.detector.digest}")
        if "3d_spatial" in used:
            said.append(f"depth-{self.depth.digest}")
        if used & {"non_spatial", "complex"}:
            said.append(self.clip.identity)
        return ", ".join(said)

    # --- scores ---------------------------------------------------------------------------------

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """Scores in [0, 1] by category; of complex prompts the parts hold all three."""
        values, notes = [math.nan] * len(requests), [""] * len(requests)
        parts = {n: [math.nan] * len(requests) for n in ("attribute", "spatial", "action")}
        prompts = [self.prompt_of(r.key) for r in requests]

        def rows_of(*categories: str) -> list[int]:
            return [k for k, p in enumerate(prompts) if p.task in (*categories, "complex")]

        for part, rows, score in (
            ("attribute", rows_of(*ATTRIBUTES), self._attributes),
            ("spatial", rows_of(*OBJECTS), self._objects),
            ("action", rows_of("non_spatial"), self._action),
        ):
            found = score(media[rows], [prompts[k] for k in rows]) if rows else []
            for k, (value, note) in zip(rows, found, strict=True):
                values[k] = parts[part][k] = value
                notes[k] = notes[k] or note
        for k, prompt in enumerate(prompts):
            if prompt.task == "complex":
                kind = self._kinds.get(_first_sentence(prompt.text), "")
                values[k] = three_in_one(kind, *(parts[n][k] for n in parts))
        scores = torch.tensor(values)
        told = {n: torch.tensor(p) for n, p in parts.items()}
        said = [n if math.isnan(v) else "" for n, v in zip(notes, values, strict=True)]
        notes_or_none = tuple(said) if any(said) else ()
        return Score(scores, scores.isfinite(), told, notes_or_none, self.identity)

    def _attributes(self, media: Media, prompts: Sequence[Prompt]) -> list[tuple[float, str]]:
        asked = [phrases_of(p.text, self.phrases) for p in prompts]
        answers, notes = ask_questions(self, media, asked)
        return [(math.prod(a) if a else math.nan, n or "" if a else "no phrase was found")
                for a, n in zip(answers, notes, strict=True)]  # fmt: skip

    def _objects(self, media: Media, prompts: Sequence[Prompt]) -> list[tuple[float, str]]:
        pixels = media.data.to(pick_device(self._device))
        # The rules measure in pixels of 512 x 512.
        scaled = torch.nn.functional.interpolate(
            pixels, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True
        ).clamp(0, 1)
        found = self.detector(scaled)
        deep = [k for k, p in enumerate(prompts) if p.task == "3d_spatial"]
        maps = dict(zip(deep, self.depth(scaled[deep]).cpu(), strict=True)) if deep else {}
        return [self._rule(p, found[k], maps.get(k)) for k, p in enumerate(prompts)]

    def _rule(self, prompt: Prompt, found: Found, near: Tensor | None) -> tuple[float, str]:
        known, compat = self.detector.classes, self.mode == "compat"
        try:
            if prompt.task == "numeracy":
                return numeracy_score(found, numeracy_request(prompt.text, known)), ""
            if near is not None:
                relation, a, b = depth_request(prompt.text, known)
                return depth_score(relation, found, (a, b), near, compat), ""
            relation, a, b = spatial_request(prompt.text, known)
        except PhraseError as error:
            return math.nan, str(error)
        first, second = (next(iter(found.get(name, ())), None) for name in (a, b))
        return spatial_score(relation, first, second, compat=compat), ""

    def _action(self, media: Media, prompts: Sequence[Prompt]) -> list[tuple[float, str]]:
        score = self.scored(self.clip, media, [p.text for p in prompts])
        notes = score.notes or ("",) * len(score)
        values = torch.where(score.valid, score.value, torch.nan).tolist()
        return list(zip(values, notes, strict=True))

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """The mean of each category; the authors give no overall number."""
        return {task: mean(values) for task, values in grouped(rows, lambda r: r.task).items()}


def _prompt(category: str, index: int, text: str) -> Prompt:
    return Prompt(id=f"{category}-{index:03d}", item=str(index), text=text, task=category)


def _first_sentence(text: str) -> str:
    return text.split(".")[0].strip().lower()
