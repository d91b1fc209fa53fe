"""Diversity of a generator: how different its pictures of one prompt are.

With the cosines of an embedding model between the ``k`` pictures of a prompt::

    value of a picture   mean of 1 - cos to the other pictures of its prompt
    Vendi score          exp(-sum l log l) of the eigenvalues l of cos / k, from 1 to k

(Friedman and Dieng 2022, 2210.02410). A prompt's value is thereby the mean over its pairs, and
intervals are by prompt. Noise is diverse too: read it beside a reward. Both modes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.base import DataError, Numbers, Prompt, PromptBenchmark, Rows, mean
from eval.benchmarks.tables import lines_of
from eval.layouts import Cell
from eval.metrics.distribution import distances_to_others, vendi_score
from eval.metrics.features import Embedded, features_of
from eval.result import Row
from eval.sets import SetMeasure, openable, pending
from mmalign.assets import asset
from mmalign.protocols import Request
from mmalign.runtime.device import pick_device
from mmalign.shapes import TASKS, prompts
from mmalign.types import Media, Score

SHAPES = Path("shapes world, test split")  # stands for prompts that are in no file
PER_TASK = 5
PUBLISHED = "openai/clip-vit-large-patch14"


class Diversity(PromptBenchmark):
    """Eight pictures of each prompt, compared with each other.

    Args:
        data: a text file with one prompt a line; ``None`` takes prompts of the shapes world.
        embedder: checkpoint of the embedding model; by default the shipped one for the shapes
            world, CLIP ViT-L/14 for other prompts.
        mode, samples_per_prompt, device: see :class:`PromptBenchmark`.

    Raises:
        ValueError: fewer than two pictures of a prompt.
    """

    name = "diversity"
    version = "1"
    files = "a text file with one prompt a line"
    samples = 8
    unit = "score"

    def __init__(
        self,
        data: str | Path | None = None,
        *,
        embedder: str | Path | None = None,
        **common: Any,
    ) -> None:
        if common.get("reward") is not None:
            raise ValueError(
                "diversity judges by an embedding model: give -o embedder=, not reward"
            )
        super().__init__(data, **common)
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"diversity compares pictures of a prompt: samples_per_prompt must be 2 or more, "
                f"got {self.samples_per_prompt}"
            )
        shipped = asset("shapes-clip") if self.data == SHAPES else PUBLISHED
        self._checkpoint = shipped if embedder is None else embedder
        self._where = pick_device(self._device)

    def find(self, data: str | Path | None) -> Path:
        """As in the base; without a file the shapes world's prompts."""
        if data is None:
            return SHAPES
        found = super().find(data)
        if not found.is_file():
            raise DataError(f"diversity: {found} is no file; give {self.files} with --data")
        return found

    def rows(self) -> Rows:
        """One prompt for each line, or five of each task of the shapes world."""
        lines = _shapes_lines() if self.data == SHAPES else lines_of(self.data)
        for index, (where, text) in enumerate(lines):
            # One task: intervals by prompt need ten prompts or more in it.
            made = Prompt(id=f"{index:05d}", text=text, task="all")
            yield where, lambda made=made: made  # type: ignore[misc]

    @cached_property
    def network(self) -> Embedded:
        """The embedding model."""
        return Embedded(self._checkpoint, self._where)

    @property
    def identity(self) -> str:
        """The embedding model's weights and preprocessing."""
        return self.network.identity

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """Nothing yet: pictures are measured as a set."""
        return pending(len(requests), self.identity)

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """None before the set is measured."""
        return {}

    def measure_set(self, rows: Sequence[Row], cells: Mapping[str, Cell]) -> SetMeasure:
        """Distances within each prompt, and the Vendi scores of prompts and of everything."""
        numbers, pictures, problems = openable([cells[r.key] for r in rows])
        read, (features,), lost = features_of(pictures, [self.network], device=self._where)
        groups: dict[str, list[int]] = {}
        for place, number in enumerate(read):
            groups.setdefault(rows[numbers[number]].prompt, []).append(place)
        values: dict[str, float] = {}
        vendi = []
        for places in groups.values():
            if len(places) > 1:
                own = features[places]
                vendi.append(vendi_score(own))
                keys = [rows[numbers[read[p]]].key for p in places]
                values |= dict(zip(keys, distances_to_others(own).tolist(), strict=True))
        told: Numbers = {
            "mean pairwise distance": mean(values.values()),
            "Vendi score of a prompt": float(np.mean(vendi)) if vendi else None,
            "Vendi score of all pictures": vendi_score(features) if len(features) else None,
        }
        return SetMeasure(values, told, [*problems, *lost])


def _shapes_lines() -> Iterator[tuple[str, str]]:
    """Task and prompt, the tasks in turn."""
    drawn = {task: prompts("test", task, PER_TASK) for task in TASKS}
    for index in range(PER_TASK):
        for task, texts in drawn.items():
            if index < len(texts):
                yield task, texts[index]
