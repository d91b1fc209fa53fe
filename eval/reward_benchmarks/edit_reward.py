"""EditReward-Bench (Luo et al. 2025, arXiv:2509.23909): which of two edits is better, by task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from eval.reward_benchmarks.base import RewardBenchmark
from eval.reward_benchmarks.items import Item
from eval.reward_benchmarks.measures import (
    Measure,
    comparison_measures,
    half_credit,
    macro_of,
    mean_of,
    strict,
)
from eval.reward_benchmarks.tables import Row, find, read_rows

DIMENSIONS = ("overall", "prompt_following", "consistency")


class EditRewardBench(RewardBenchmark):
    """Pairs of edits, each judged in one of three dimensions.

    Args:
        data: Parquet of ``EditScore/EditReward-Bench`` (``key, instruction, input_image,
            output_images, dimension, task_type``; the first output is the better one), or its
            folder.

    * Edits are resized to the size of the source (bicubic) before they are judged.
    * An edit that occurs in several pairs or dimensions is scored once.
    * A reward's part that is named like the dimension answers; else its value does.
    * The number of a dimension is the unweighted mean over tasks of pair accuracy; a predicted tie
      is wrong. Both modes are the same.
    """

    name = "edit_reward_bench"
    files = "Parquet of EditScore/EditReward-Bench or its folder"

    def rows(self) -> Iterable[tuple[str, Callable[[], Sequence[Item]]]]:
        """One pair a row."""
        assert self.data is not None
        number = 0
        for file in find(self.data, "*.parquet", "data/*.parquet"):
            for place, row in read_rows(file):
                yield place, partial(_pair, row, number)
                number += 1

    def measures(self) -> Sequence[Measure]:
        """One number a dimension, ``overall`` first."""
        said = "mean over tasks of pair accuracy; a predicted tie is wrong"
        found = [
            Measure(name.replace("_", " "), said, macro_of(strict), strict, 0.5, name)
            for name in DIMENSIONS
        ]
        half = "over all pairs of all dimensions; a predicted tie counts one half"
        pooled = Measure("pairs, ties half", half, mean_of(half_credit), half_credit, 0.5)
        return [*found, pooled, *comparison_measures()]


def _pair(row: Row, number: int) -> list[Item]:
    dimension = row.choice({d: d for d in DIMENSIONS}, "dimension")
    row.listed("output_images", count=2)
    size = row.size("input_image")
    made = tuple(replace(row.picture("output_images", k), size=size) for k in (0, 1))
    return [
        Item(
            key=f"{number:05d}",
            prompt=row.text("instruction"),
            candidates=made,
            truth=(1.0, 0.0),
            category=row.text("task_type"),
            dimension=dimension,
            context={"source": row.picture("input_image")},
        )
    ]
