"""VBench (Huang et al. 2023, 2311.17982): 944 prompts for videos, by 16 dimensions.

The published score of each dimension has a network of its own (CLIP, DINO, RAFT, GRiT, UMT,
ViCLIP, ...), which are not part of this project. Here any reward of videos judges; its means stand
by dimension, under the reward's name and not under VBench's. One dimension needs no network and is
computed as published, on the 8-bit frames ``f_1 ... f_T`` of a video::

    temporal flickering = (255 - mean over t of mean|f_t - f_(t+1)|) / 255

(there after leaving out videos that move, which takes optical flow: not done, and named so).

:func:`totals` aggregates scores that the authors' own scripts have computed. With the published
ranges ``[a_d, b_d]`` and weights ``w_d`` (1, and 1/2 for the dynamic degree)::

    n_d      = (s_d - a_d) / (b_d - a_d)
    quality  = sum over its 7 dimensions of w_d n_d / sum of w_d;  semantic: the same over 9
    total    = (4 quality + semantic) / 5
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.benchmarks.base import (
    DataError,
    Numbers,
    Prompt,
    PromptBenchmark,
    RowError,
    Rows,
    mean,
    scored_rows,
)
from eval.benchmarks.tables import json_of, one_file
from eval.result import Row
from mmalign.protocols import Request, RewardModel
from mmalign.registry import unknown
from mmalign.types import Media, MediaKind, Score

QUALITY = {
    "subject_consistency": (0.1462, 1.0), "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0), "motion_smoothness": (0.706, 0.9975),
    "dynamic_degree": (0.0, 1.0), "aesthetic_quality": (0.0, 1.0), "imaging_quality": (0.0, 1.0),
}  # fmt: skip
SEMANTIC = {
    "object_class": (0.0, 1.0), "multiple_objects": (0.0, 1.0), "human_action": (0.0, 1.0),
    "color": (0.0, 1.0), "spatial_relationship": (0.0, 1.0), "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855), "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}  # fmt: skip
RANGES = {**QUALITY, **SEMANTIC}
WEIGHTS = {"dynamic_degree": 0.5}
FLICKER = "temporal_flickering"


class VBench(PromptBenchmark):
    """944 prompts, five videos each; ``data`` is ``VBench_full_info.json``.

    A prompt that stands in the file for several dimensions is asked for once. The authors make 25
    videos for temporal flickering (``-o dimensions=[temporal_flickering]`` with
    ``samples_per_prompt=25``).

    Args:
        dimensions: which; ``None`` takes all. A prompt counts for those of its dimensions.
        scores: a JSON file of VBench's own scores by dimension, as raw shares: the numbers then
            hold the published aggregates as well.
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`; both modes
            are the same, and the default reward is CLIPScore of every frame.
    """

    name = "vbench"
    version = "1"
    files = "VBench_full_info.json"
    media: MediaKind = "video"
    samples = 5
    reward_spec: Any = {"compose": "frames", "parts": ["clip_score"]}  # noqa: RUF012
    keeps_parts = True
    layout = "vbench"

    def __init__(
        self,
        data: str | Path | None = None,
        *,
        dimensions: Sequence[str] | None = None,
        scores: str | Path | None = None,
        **common: Any,
    ) -> None:
        for name in dimensions or ():
            if name not in RANGES:
                raise unknown("dimension of vbench", name, RANGES)
        self.dimensions = tuple(dimensions or RANGES)
        self.totals = {} if scores is None else totals(_read_scores(Path(scores)))
        super().__init__(data, **common)

    @cached_property
    def reward(self) -> RewardModel:
        """What judges. Raises ``ValueError`` for a reward of pictures."""
        found = super().reward
        if "video" not in found.info.media:
            raise ValueError(
                f"vbench: reward {found.info.name!r} takes pictures; ask it about the frames: "
                "-o 'reward={compose: frames, parts: [NAME]}'"
            )
        return found

    def settings(self) -> dict[str, Any]:
        """The dimensions, where they are not all."""
        return {} if len(self.dimensions) == len(RANGES) else {"dimensions": self.dimensions}

    def rows(self) -> Rows:
        """One prompt for each text; the dimensions of its entries together."""
        path = one_file(self.data, self.files)
        records = json_of(path)
        if not isinstance(records, list):
            raise DataError(
                f"{path} must hold a list of prompts, it holds {type(records).__name__}"
            )
        merged: dict[str, list[str]] = {}
        for k, record in enumerate(records):
            try:
                text, dimensions = _entry(record)
            except RowError as error:
                yield f"{path.name}, entry {k}", _raiser(error)
                continue
            held = merged.setdefault(text, [])
            held += [d for d in dimensions if d not in held]
        wanted = [(text, ds) for text, ds in merged.items() if set(ds) & set(self.dimensions)]
        for k, (text, dimensions) in enumerate(wanted):
            own = tuple(d for d in dimensions if d in self.dimensions)
            made = Prompt(id=f"{k:04d}", text=text, task=own[0], facts={"dimensions": own})
            yield f"{path.name}, {text!r}", lambda made=made: made  # type: ignore[misc]

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """The reward's score of each video, with ``temporal_flickering`` as a part."""
        score = super().judge(media, requests)
        return replace(score, parts={**score.parts, FLICKER: flickering(media.data)})

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """Means of the reward, in total and by dimension; flickering; totals where scores are."""
        told = [(self.prompt_of(r.key).facts["dimensions"], r, v) for r, v in scored_rows(rows)]
        found: Numbers = {"reward": mean(v for _, _, v in told)}
        for name in self.dimensions:
            own = [v for dimensions, _, v in told if name in dimensions]
            if own:
                found[f"reward on {name}"] = mean(own)
        still = [r.parts.get(FLICKER) for ds, r, _ in told if FLICKER in ds]
        if still:
            found[f"{FLICKER}, without the static filter"] = mean(v for v in still if v is not None)
        return {**found, **self.totals}


def flickering(videos: Tensor) -> Tensor:
    """``(255 - mean absolute difference of neighbouring 8-bit frames) / 255``, ``(B,)``.

    NaN for videos ``(B, T, 3, H, W)`` of one frame, which have no neighbours.
    """
    frames = (videos.float() * 255).round().clamp(0, 255)
    change = (frames[:, 1:] - frames[:, :-1]).abs().flatten(2).mean(2)
    return (255 - change.mean(1)) / 255


def totals(scores: Mapping[str, float]) -> dict[str, float | None]:
    """``quality``, ``semantic`` and ``total`` of raw scores by dimension, see the module.

    A part without all of its dimensions is left out, and so is the total: the published script
    counts what is missing as 0. Like there, nothing is clipped to the ranges.

    Raises:
        UnknownNameError: a score of no dimension.
    """
    for name in scores:
        if name not in RANGES:
            raise unknown("dimension of vbench", name, RANGES)
    found: dict[str, float | None] = {}
    for part, ranges in (("quality", QUALITY), ("semantic", SEMANTIC)):
        if set(ranges) <= set(scores):
            weights = {d: WEIGHTS.get(d, 1.0) for d in ranges}
            placed = {d: (scores[d] - a) / (b - a) for d, (a, b) in ranges.items()}
            found[part] = sum(weights[d] * placed[d] for d in ranges) / sum(weights.values())
    if len(found) == 2:
        quality, semantic = found["quality"], found["semantic"]
        found["total"] = (4 * (quality or 0.0) + (semantic or 0.0)) / 5
    return found


def _entry(record: Any) -> tuple[str, list[str]]:
    text = record.get("prompt_en") if isinstance(record, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise RowError("no text 'prompt_en'")
    dimensions = record.get("dimension")
    if not isinstance(dimensions, list) or not dimensions:
        raise RowError("no list 'dimension'")
    strange = [d for d in dimensions if d not in RANGES]
    if strange:
        raise RowError(f"dimension {strange[0]!r} is none of {', '.join(RANGES)}")
    return text.strip(), [str(d) for d in dimensions]


def _raiser(error: RowError) -> Any:
    def make() -> Prompt:
        raise error

    return make


def _read_scores(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"scores {path} cannot be read: {error}") from error
    good = isinstance(found, dict) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in found.values()
    )
    if not good:
        raise DataError(f"scores {path} must be a JSON object of numbers by dimension")
    return {str(k): float(v) for k, v in found.items()}
