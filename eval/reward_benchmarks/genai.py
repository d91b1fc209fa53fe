"""TIGER GenAI-Bench (Jiang et al. 2024, arXiv:2406.04485): votes that know two kinds of ties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eval.metrics.pairs import Mode
from eval.reward_benchmarks.base import DataError, RewardBenchmark
from eval.reward_benchmarks.items import Item
from eval.reward_benchmarks.measures import (
    Measure,
    comparison_measures,
    mean_of,
    pair_measures,
    votes,
    with_ties,
)
from eval.reward_benchmarks.tables import Row, find, read_rows

# Prompt, then the two things that are compared, by task.
TASKS = {
    "image_generation": ("prompt", "left_image", "right_image"),
    "image_edition": ("instruct_prompt", "left_output_image", "right_output_image"),
    "video_generation": ("prompt", "left_video", "right_video"),
}
VOTES = {
    "leftvote": (1.0, 0.0),
    "rightvote": (0.0, 1.0),
    "tievote": (1.0, 1.0),
    "bothbad_vote": (0.0, 0.0),
}


class GenAIBench(RewardBenchmark):
    """One of the three tasks.

    Args:
        data: a Parquet file of the task, or the folder that holds ``<task>/*.parquet``.
        task: ``image_generation``, ``image_edition`` (``context["source"]`` is the picture that
            was edited) or ``video_generation``.
        mode: in ``compat`` the vote accuracy takes in items without a readable answer as wrong,
            as the official script does; in ``fixed`` it leaves them out.

    The official protocol has four answers. Scores and comparisons cannot say whether a tie is good
    or bad; their tie is the plain ``A=B``, which the official parser accepts for both.
    """

    name = "genai_bench"
    files = "a Parquet file of TIGER-Lab/GenAI-Bench or its folder"

    def __init__(
        self,
        data: str | Path | None = None,
        mode: Mode = "compat",
        *,
        task: str = "image_generation",
    ) -> None:
        if task not in TASKS:
            raise DataError(f"task {task!r} is unknown; use {', '.join(TASKS)}")
        super().__init__(data, mode)
        self.task = task
        self.media = "video" if task == "video_generation" else "image"

    @property
    def options(self) -> dict[str, Any]:
        """The task."""
        return {"task": self.task}

    def rows(self) -> Iterable[tuple[str, Callable[[], Sequence[Item]]]]:
        """One pair a row."""
        assert self.data is not None
        number = 0
        for file in find(self.data, f"{self.task}/*.parquet", "*.parquet"):
            for place, row in read_rows(file, self.data if self.data.is_dir() else None):
                yield place, partial(self._pair, row, f"{self.task}-{number:05d}")
                number += 1

    def _pair(self, row: Row, key: str) -> list[Item]:
        prompt, left, right = TASKS[self.task]
        made = (
            row.picture(left, maker=row.text("left_model", default="")),
            row.picture(right, maker=row.text("right_model", default="")),
        )
        context = {"source": row.picture("source_image")} if self.task == "image_edition" else {}
        truth = row.choice(VOTES, "vote_type")
        return [Item(key=key, prompt=row.text(prompt), candidates=made, truth=truth,
                     context=context)]  # fmt: skip

    def measures(self) -> Sequence[Measure]:
        """Vote accuracy first; then the two protocols for scores."""
        compat = self.mode == "compat"
        said = "A, B or a tie of either kind is voted as people did"
        said += "; no readable answer is wrong" if compat else ""
        return [
            Measure("vote accuracy", said, mean_of(votes), votes, everything=compat),
            *pair_measures(),
            Measure("accuracy with ties", "human ties included, at the best tie threshold on these "
                    "very pairs", with_ties("fixed")),
            *comparison_measures(),
        ]  # fmt: skip
