"""VideoGen-RewardBench (Liu et al. 2025, arXiv:2501.13918): pairs of videos, four dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from eval.reward_benchmarks.base import RewardBenchmark
from eval.reward_benchmarks.items import Item
from eval.reward_benchmarks.measures import (
    Measure,
    comparison_measures,
    mean_of,
    strict,
    with_ties,
)
from eval.reward_benchmarks.tables import Row, find, read_rows

DIMENSIONS = ("Overall", "VQ", "MQ", "TA")
MEANINGS = {"VQ": "visual quality", "MQ": "motion quality", "TA": "text alignment"}
A, B, SAME = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)
LABELS = {"A": A, "B": B, "same": SAME, 1: A, -1: B, 0: SAME, "1": A, "-1": B, "0": SAME}


class VideoGenRewardBench(RewardBenchmark):
    """Accuracy with and without ties, for each dimension.

    Args:
        data: ``videogen-rewardbench.csv`` (``path_A, path_B, A_model, B_model, prompt, VQ, MQ, TA,
            Overall``; labels ``A``, ``B``, ``same``) or its folder; videos are found from there.
        mode: how ties are calibrated, see :func:`~eval.metrics.pairs.accuracy_with_ties`.

    A reward's parts ``VQ``, ``MQ`` and ``TA`` answer for their dimensions; of a reward without
    parts the value answers for all four. Every video is scored once.
    """

    name = "videogen_reward_bench"
    media = "video"
    files = "videogen-rewardbench.csv or its folder"

    def rows(self) -> Iterable[tuple[str, Callable[[], Sequence[Item]]]]:
        """Four items a row, one a dimension."""
        assert self.data is not None
        for file in find(self.data, "videogen-rewardbench.csv", "*.csv"):
            for number, (place, row) in enumerate(read_rows(file)):
                yield place, partial(_pairs, row, number)

    def measures(self) -> Sequence[Measure]:
        """Both accuracies of each dimension, ``Overall`` first."""
        ties = "human ties included, at the best tie threshold on these very pairs"
        none = "pairs that people ordered; a predicted tie is wrong"
        found = []
        for name in DIMENSIONS:
            of = MEANINGS.get(name, "overall")
            found.append(Measure(f"{name} without ties", f"{of}: {none}", mean_of(strict), strict,
                                 0.5, name))  # fmt: skip
            found.append(Measure(f"{name} with ties", f"{of}: {ties}", with_ties(self.mode),
                                 of=name))  # fmt: skip
        return [*found, *comparison_measures()]


def _pairs(row: Row, number: int) -> list[Item]:
    prompt = row.text("prompt")
    videos = (
        row.file(row.text("path_A"), row.text("A_model", default="")),
        row.file(row.text("path_B"), row.text("B_model", default="")),
    )
    return [
        Item(key=f"{number:05d}-{name}", prompt=prompt, candidates=videos,
             truth=row.choice(LABELS, name), dimension=name)
        for name in DIMENSIONS
    ]  # fmt: skip
