"""Pick-a-Pic (Kirstain et al. 2023, arXiv:2305.01569): which of two pictures people chose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eval.metrics.pairs import Mode, best_threshold, threshold_points
from eval.reward_benchmarks.base import RewardBenchmark, RowError
from eval.reward_benchmarks.items import Item, Judged
from eval.reward_benchmarks.measures import (
    Measure,
    comparison_measures,
    labels_and_differences,
    mean_of,
    pair_measures,
)
from eval.reward_benchmarks.tables import Row, find, read_rows
from eval.statistics import Interval

VALIDATION, TEST = "validation", "test"
LABELS = {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}


class PickAPic(RewardBenchmark):
    """Points at a tie threshold that is chosen on the validation split.

    Args:
        data: a Parquet file of ``pickapic_v1`` with pictures (``caption, jpg_0, jpg_1, label_0,
            label_1``), or a folder with ``*test_unique*.parquet`` and, for the threshold,
            ``*validation_unique*.parquet``.
        threshold: of the probability difference, instead of choosing it on validation; ``None``
            chooses it, or takes 0 where there is no validation split.

    Both modes are the same: the definition has no quirk.
    """

    name = "pick_a_pic"
    files = "a Parquet file of pickapic_v1 with pictures, or the folder of its splits"

    def __init__(
        self,
        data: str | Path | None = None,
        mode: Mode = "compat",
        *,
        threshold: float | None = None,
    ) -> None:
        super().__init__(data, mode)
        self.threshold = threshold

    @property
    def options(self) -> dict[str, Any]:
        """The threshold that was asked for."""
        return {"threshold": self.threshold}

    def rows(self) -> Iterable[tuple[str, Callable[[], Sequence[Item]]]]:
        """Pairs of the test split, then those of the validation split where it is there."""
        assert self.data is not None
        found = find(self.data, "*test_unique*.parquet", "*.parquet")
        files = [(f, TEST) for f in found if VALIDATION not in f.name or f == self.data]
        if self.data.is_dir() and self.threshold is None:
            files += [(f, VALIDATION) for f in sorted(self.data.glob("*validation_unique*"))]
        for file, split in files:
            for number, (place, row) in enumerate(read_rows(file)):
                yield place, partial(_pair, row, f"{split}-{file.stem}-{number:06d}", split)

    def measures(self) -> Sequence[Measure]:
        """Points first; then accuracies over pairs without human ties."""
        points = Measure(
            "points",
            "1 where prediction and label agree (ties included), 1/2 where one of them is a tie; "
            f"{'threshold chosen on validation' if self.threshold is None else self.threshold}",
            self._points,
        )
        return [points, *pair_measures(of=TEST), *comparison_measures()]

    def _points(self, judged: Sequence[Judged]) -> Interval:
        threshold = self.chosen(judged)

        def points(one: Judged) -> Sequence[float]:
            return list(threshold_points([one.item.human], [one.difference], threshold))

        return mean_of(points)([j for j in judged if j.item.dimension == TEST])

    def chosen(self, judged: Sequence[Judged]) -> float:
        """The threshold that these answers are read at."""
        held = [j for j in judged if j.item.dimension == VALIDATION and j.scored]
        if self.threshold is not None or not held:
            return self.threshold or 0.0
        return best_threshold(*labels_and_differences(held))


def _pair(row: Row, key: str, split: str) -> list[Item]:
    if row.values.get("has_label") is False:  # nobody chose; left out by the authors too
        return []
    if row.values.get("caption") is not None and not {"jpg_0", "jpg_1"} <= row.values.keys():
        raise RowError("there are no pictures (jpg_0, jpg_1); use pickapic_v1, not ..._no_images")
    labels = (row.number("label_0"), row.number("label_1"))
    if labels not in LABELS:
        raise RowError(f"label_0 and label_1 must be 1 and 0, 0 and 1, or 0.5 each, got {labels}")
    pictures = (
        row.picture("jpg_0", maker=row.text("model_0", default="")),
        row.picture("jpg_1", maker=row.text("model_1", default="")),
    )
    prompt = row.text("caption")
    return [Item(key=key, prompt=prompt, candidates=pictures, truth=labels, dimension=split)]
