"""Rankings of the pictures of one prompt: HPDv2's test set and ImageReward's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from eval.metrics.selection import best_of_n
from eval.reward_benchmarks.base import RewardBenchmark, RowError
from eval.reward_benchmarks.items import Item, Judged
from eval.reward_benchmarks.measures import (
    Measure,
    comparison_measures,
    half_credit,
    inversions,
    mean_of,
    pair_measures,
    strict,
)
from eval.reward_benchmarks.tables import Row, find, read_rows


class _Rankings(RewardBenchmark):
    """Rows of a JSON list with pictures and their ranks, 1 the best."""

    prefix = ""
    pictures = ranks = ""

    def rows(self) -> Iterable[tuple[str, Callable[[], Sequence[Item]]]]:
        """One item a row."""
        assert self.data is not None
        (file,) = find(self.data, "test.json")
        for number, (place, row) in enumerate(read_rows(file)):
            yield place, partial(self.ranking, row, f"{self.prefix}-{number:05d}")

    def ranking(self, row: Row, key: str) -> list[Item]:
        """All pictures of a prompt. Raises :class:`RowError`."""
        paths = row.listed(self.pictures)
        ranks = row.listed(self.ranks, count=len(paths))
        if len(paths) < 2 or not all(isinstance(r, (int, float)) for r in ranks):
            raise RowError(f"{self.ranks} must rank two pictures or more, got {ranks} for {paths}")
        made = tuple(row.file(str(path)) for path in paths)
        truth = tuple(-float(rank) for rank in ranks)
        prompt = row.text("prompt")
        return [Item(key=key, prompt=prompt, candidates=made, truth=truth, form="ranking")]


class Hpdv2(_Rankings):
    """HPDv2's test set (Wu et al. 2023, arXiv:2306.09341): agreement of rankings.

    Args:
        data: ``test.json`` (``prompt, image_path, rank``) or its folder; pictures are looked for
            beside it and in ``test`` and ``images``.

        mode: of equal scores. The published script (``compat``) ranks them in the order of the
            file, which is chance; ``fixed`` counts half an inversion. Human ties are free in both.
    """

    name = "hpdv2"
    files = "test.json of HPDv2 or its folder"
    prefix, pictures, ranks = "hpdv2", "image_path", "rank"

    def measures(self) -> Sequence[Measure]:
        """The inversion score first."""
        compat = self.mode == "compat"
        points = inversions("order" if compat else "half")
        said = "1 - inversions / pairs; human ties are free; of equal scores "
        said += "the earlier is ahead" if compat else "half an inversion"
        first = Measure("agreement", said, mean_of(points), points)
        return [first, *pair_measures(), _top(), *comparison_measures()]


class ImageRewardTest(_Rankings):
    """ImageReward's test set (Xu et al. 2023, arXiv:2304.05977): pairs of a ranking with ties.

    Args:
        data: ``test.json`` (``id, prompt, generations, ranking``) or its folder.

    Both modes are the same: pairs that people tied are left out, a predicted tie is wrong.
    """

    name = "image_reward"
    files = "test.json of ImageReward or its folder"
    prefix, pictures, ranks = "image-reward", "generations", "ranking"

    def measures(self) -> Sequence[Measure]:
        """Accuracy over all pairs of all rankings first."""
        said = "pairs with different ranks, over all rankings; a predicted tie is wrong"
        return [
            Measure("accuracy", said, mean_of(strict), strict, 0.5),
            Measure("accuracy, ties half", "the same; a predicted tie counts one half",
                    mean_of(half_credit), half_credit, 0.5),
            _top(),
            *comparison_measures(),
        ]  # fmt: skip


def _top() -> Measure:
    said = "how often the highest-scored picture is one that people ranked first"
    return Measure("best chosen", said, mean_of(_first_chosen), _first_chosen)


def _first_chosen(judged: Judged) -> Sequence[float]:
    truth = judged.item.truth
    return [best_of_n(judged.scores, [float(t == max(truth)) for t in truth])]
