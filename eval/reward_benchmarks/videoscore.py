"""VideoScore-Bench-v2 (He et al. 2025, arXiv:2509.22799): videos rated from 1 to 5."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eval.metrics.pairs import Mode
from eval.reward_benchmarks.base import DataError, RewardBenchmark, RowError
from eval.reward_benchmarks.items import Item, Judged
from eval.reward_benchmarks.measures import CORRELATIONS, Measure, correlation, mean_of
from eval.reward_benchmarks.tables import Row, find, read_rows

# Dimension (and name of a reward's part that answers) to the columns that may hold its rating.
RATINGS = {
    "visual_quality": ("v_score_gt", "visual_quality", "v_score"),
    "text_alignment": ("t_score_gt", "text_alignment", "t2v_alignment", "t_score"),
    "physical_consistency": ("p_score_gt", "physical_consistency", "p_score"),
}
LOWEST, HIGHEST = 1, 5
SUFFIXES = ("", ".mp4", ".gif", ".webm")


class VideoScoreBench(RewardBenchmark):
    """Exact and relaxed accuracy of the rounded score, and correlations.

    Args:
        data: JSON, JSON lines or Parquet with ``video_name`` (or ``video``), the prompt
            (``t2v_prompt`` or ``prompt``) and the ratings ``v_score_gt, t_score_gt, p_score_gt``,
            or a folder with such a file; videos are found from there, also in ``videos``.
        scale: the reward's lowest and highest score, mapped linearly onto 1 and 5 for the
            accuracies. Correlations need no scale.

    A score is clamped to [1, 5] and rounded before it is compared, halves to the even number, as
    in the official script. Both modes are the same.
    """

    name = "videoscore_bench"
    media = "video"
    files = "the table of VideoScore-Bench-v2 or its folder"

    def __init__(
        self,
        data: str | Path | None = None,
        mode: Mode = "compat",
        *,
        scale: Sequence[float] = (LOWEST, HIGHEST),
    ) -> None:
        if len(scale) != 2 or not scale[0] < scale[1]:
            raise DataError(f"scale must be the lowest and the highest score, got {scale}")
        super().__init__(data, mode)
        self.scale = (float(scale[0]), float(scale[1]))

    @property
    def options(self) -> dict[str, Any]:
        """The scale."""
        return {"scale": list(self.scale)}

    def rows(self) -> Iterable[tuple[str, Callable[[], Sequence[Item]]]]:
        """Three items a row, one a dimension."""
        assert self.data is not None
        for file in find(self.data, "*.jsonl", "*.json", "*.parquet"):
            for number, (place, row) in enumerate(read_rows(file)):
                yield place, partial(_ratings, row, f"{file.stem}-{number:05d}")

    def measures(self) -> Sequence[Measure]:
        """Accuracies over all dimensions, then everything for each dimension."""
        exact, relaxed = partial(self._near, 0), partial(self._near, 1)
        found = [
            Measure("accuracy", "rounded score equals the rating, mean over dimensions",
                    mean_of(exact), exact),
            Measure("accuracy within 1", "rounded score is at most 1 away", mean_of(relaxed),
                    relaxed),
        ]  # fmt: skip
        for name in RATINGS:
            words = name.replace("_", " ")
            found.append(Measure(f"accuracy, {words}", "of this dimension", mean_of(exact), exact,
                                 of=name))  # fmt: skip
            found += [
                Measure(f"{kind}, {words}", f"{kind} of scores and ratings", correlation(kind),
                        of=name, share=False)
                for kind in CORRELATIONS
            ]  # fmt: skip
        return found

    def rating(self, score: float) -> int:
        """A score as the rating it stands for."""
        low, high = self.scale
        placed = LOWEST + (score - low) / (high - low) * (HIGHEST - LOWEST)
        return round(min(HIGHEST, max(LOWEST, placed)))

    def _near(self, distance: int, judged: Judged) -> Sequence[float]:
        off = abs(self.rating(judged.scores[0]) - judged.item.truth[0])
        return [float(off <= distance)]


def _ratings(row: Row, key: str) -> list[Item]:
    prompt = row.text("t2v_prompt", "prompt", "text_prompt")
    name = row.text("video_name", "video", "video_path")
    video = row.file(name, suffixes=SUFFIXES)
    items = []
    for dimension, columns in RATINGS.items():
        rating = row.number(*columns)
        if not LOWEST <= rating <= HIGHEST:
            raise RowError(f"{columns[0]} must lie in [{LOWEST}, {HIGHEST}], got {rating:g}")
        items.append(Item(key=f"{key}-{dimension}", prompt=prompt, candidates=(video,),
                          truth=(rating,), form="rating", dimension=dimension))  # fmt: skip
    return items
