"""Two answers in words to a question about pictures: four benchmarks and any file of such pairs.

All go through :class:`~eval.reward_benchmarks.answers.AnswerJudge`. The official questions to the
judge are not used (they belong to their repositories); numbers are comparable between judges here,
and close to published ones only as far as the wording of the question does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eval.metrics.pairs import Mode
from eval.reward_benchmarks.answers import Order
from eval.reward_benchmarks.base import RewardBenchmark, RowError
from eval.reward_benchmarks.items import Candidate, Item, Judged, text_candidate
from eval.reward_benchmarks.measures import (
    Measure,
    all_pairs_right,
    comparison_measures,
    half_credit,
    macro_of,
    mean_of,
    pair_measures,
    strict,
)
from eval.reward_benchmarks.tables import Row, find, read_rows

CHOSEN_FIRST = (1.0, 0.0)


class AnswerPairs(RewardBenchmark):
    """Any two answers, from JSON lines (or JSON, CSV, Parquet).

    Columns: ``prompt`` (or ``question``), ``chosen``, ``rejected``; ``image`` (a path, or in
    Parquet a picture), ``images`` (a list) or ``video`` where there are any; ``category`` and
    ``id`` where wanted. Paths start from the file's folder.

    Args:
        data: the file.
        votes: how often each pair is asked about; ``order`` of the answers: ``balanced`` or
            ``random``, see :class:`~eval.reward_benchmarks.answers.AnswerJudge`.
        fields: column to use in place of each of the above, ``{"prompt": "query"}``.
    """

    name = "answer_pairs"
    media = "text"
    files = "a .jsonl, .json, .csv or .parquet with prompt, chosen and rejected"
    patterns: tuple[str, ...] = ("*.jsonl", "*.json", "*.parquet")
    fields: Mapping[str, str] = {}
    default_votes, default_order = 2, "balanced"

    def __init__(
        self,
        data: str | Path | None = None,
        mode: Mode = "compat",
        *,
        votes: int | None = None,
        order: Order | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(data, mode)
        self.votes = votes or self.default_votes
        self.order = order or self.default_order
        self.columns = {**self.fields, **(fields or {})}

    @property
    def options(self) -> dict[str, Any]:
        """How the judge is asked."""
        return {"votes": self.votes, "order": self.order}

    def rows(self) -> Iterable[tuple[str, Callable[[], Sequence[Item]]]]:
        """One pair a row."""
        assert self.data is not None
        number = 0
        for file in find(self.data, *self.patterns):
            for place, row in read_rows(file):
                yield place, partial(self.pair, row, f"{number:05d}")
                number += 1

    def pair(self, row: Row, key: str) -> list[Item]:
        """The row's item. Raises :class:`RowError`."""
        chosen, rejected = (self._answer(row, name) for name in ("chosen", "rejected"))
        made = (text_candidate(chosen), text_candidate(rejected))
        question = str(row.value(*self._named("id"), default=key))
        return [
            Item(
                key=key,
                prompt=row.text(*self._named("prompt", "question")),
                candidates=made,
                truth=CHOSEN_FIRST,
                category=self.category(row),
                question=question,
                cluster=question,
                context=self.shown(row),
            )
        ]

    def category(self, row: Row) -> str:
        """The part of the benchmark a row belongs to."""
        return row.text(*self._named("category", "dimension"), default="all")

    def shown(self, row: Row) -> dict[str, Any]:
        """The pictures or the video of a question. Raises :class:`RowError`."""
        images, image, video = (self._named(n)[0] for n in ("images", "image", "video"))
        if row.values.get(images) is not None:
            return {"images": tuple(row.picture(images, k) for k in range(len(row.listed(images))))}
        held = row.values.get(image)
        if isinstance(held, (list, tuple)):
            return {"images": tuple(row.picture(image, k) for k in range(len(held)))}
        if held:
            return {"images": (row.picture(image),)}
        return {"video": row.picture(video)} if row.values.get(video) else {"images": ()}

    def measures(self) -> Sequence[Measure]:
        """Accuracy, a split vote wrong; the mean over categories."""
        macro = Measure("mean over categories", "unweighted mean of their accuracies",
                        macro_of(strict), strict, 0.5)  # fmt: skip
        return [*pair_measures(), macro, *comparison_measures()]

    def _named(self, *names: str) -> list[str]:
        return [self.columns.get(name, name) for name in names]

    def _answer(self, row: Row, name: str) -> str:
        """A text, or steps of a solution as a numbered text."""
        found = row.value(*self._named(name))
        if isinstance(found, (list, tuple)):
            return "\n".join(f"{k}. {step}" for k, step in enumerate(found, 1))
        return row.text(*self._named(name))


class VideoRewardBench(AnswerPairs):
    """VideoRewardBench (Zhang et al. 2025, arXiv:2509.00484): 1,563 pairs of answers on videos.

    Columns as of :class:`AnswerPairs`, with ``video`` and ``category`` (perception, knowledge,
    reasoning, safety). The column names of the published files could not be checked: give
    ``fields`` where they differ.
    """

    name = "video_reward_bench"
    files = "the JSON lines of VideoRewardBench (videos below its folder)"

    def shown(self, row: Row) -> dict[str, Any]:
        """The video, which there has to be. Raises :class:`RowError`."""
        (video,) = self._named("video")
        return {"video": row.picture(video)}


class VLRMBench(AnswerPairs):
    """VLRMBench (Ruan et al. 2025, arXiv:2503.07478): its task of two solutions.

    Of the twelve tasks one compares two answers, ``multi_solution``: ``step_list`` is right,
    ``reasoning_error`` wrong. Judged once in each order, as there; right where the wins of both
    orders together favour the right one. The step-wise and critique tasks are no comparisons.
    """

    name = "vlrm_bench"
    files = "multi_solution.jsonl of VLRMBench or its folder"
    patterns = ("multi_solution.jsonl", "benchmark_data/multi_solution.jsonl")
    fields: Mapping[str, str] = {
        "prompt": "question", "chosen": "step_list", "rejected": "reasoning_error",
    }  # fmt: skip


KEYWORDS = ("mcq", "long", "short", "safety", "video")


class MMRLHFRewardBench(AnswerPairs):
    """MM-RLHF-RewardBench (Zhang et al. 2025, arXiv:2502.10391): ACC and ACC+.

    Args:
        data: ``mm_reward_bench.jsonl`` (``id, prompt, chosen, rejected, image`` or ``video``) or
            its folder.

    ACC is over all pairs, ACC+ over questions (``id``): all pairs of one must be right. The
    category is the first of mcq, long, short, safety, video that the path of the picture contains.
    A preference of exactly one half is wrong. Both modes are the same.
    """

    name = "mm_rlhf_reward_bench"
    files = "mm_reward_bench.jsonl or its folder"
    patterns = ("mm_reward_bench.jsonl", "*.jsonl")

    def category(self, row: Row) -> str:
        """By the path of the picture or video."""
        path = row.text("image", "video")
        return next((word for word in KEYWORDS if word in path), "other")

    def measures(self) -> Sequence[Measure]:
        """ACC, ACC+."""
        first = Measure("ACC", "pairs that are right; a tie is wrong", mean_of(strict), strict, 0.5)
        said = "questions all of whose pairs are right"
        plus = Measure("ACC+", said, all_pairs_right, everything=True)
        return [first, plus, *comparison_measures()]


GROUPS = {
    "wildvision": "general", "vlfeedback": "general", "povid": "hallucination",
    "rlaif-v": "hallucination", "rlhf-v": "hallucination", "mathverse": "reasoning",
    "mmmu": "reasoning", "reasoning_tasks": "reasoning",
}  # fmt: skip


class VLRewardBench(AnswerPairs):
    """VL-RewardBench (Li et al. 2024, arXiv:2411.17451): 1,250 pairs in three groups.

    Args:
        data: Parquet of ``MMInstruction/VL-RewardBench`` (``id, query, response, image,
            human_ranking``) or ``data.jsonl`` of its repository (``ranking, image_path``), or the
            folder. Rank 0 is the better answer.
        votes: 10 in random order, as published.
        mode: ``compat`` counts a pair as right where more than half of all votes agree, as wrong
            where more than half reject, and leaves out all others (split votes, unreadable
            answers), as the official script does; ``fixed`` counts the majority of readable
            votes, and an even split one half.
    """

    name = "vl_reward_bench"
    files = "Parquet or data.jsonl of VL-RewardBench, or its folder"
    patterns = ("*.parquet", "data/*.parquet", "data.jsonl", "data/data.jsonl")
    fields: Mapping[str, str] = {"prompt": "query", "image": "image"}
    default_votes, default_order = 10, "random"

    def pair(self, row: Row, key: str) -> list[Item]:
        """The row's item, the better answer first. Raises :class:`RowError`."""
        answers = [str(a) for a in row.listed("response", count=2)]
        ranks = row.listed("human_ranking", "ranking", count=2)
        if sorted(ranks) != [0, 1]:
            raise RowError(f"the ranking must be [0, 1] or [1, 0], got {ranks}")
        chosen = ranks.index(0)
        made = tuple(text_candidate(answers[k]) for k in (chosen, 1 - chosen))
        return [Item(key=key, prompt=row.text("query"), candidates=made, truth=CHOSEN_FIRST,
                     category=self.category(row), cluster=row.text("id", default=key),
                     context={"images": _images(row)})]  # fmt: skip

    def category(self, row: Row) -> str:
        """The group of the collection that the id, or the picture's folder, names."""
        said = " ".join(str(row.values.get(n, "")) for n in ("id", "query_source", "image_path"))
        for name, group in GROUPS.items():
            if name in said.lower():
                return group
        raise RowError(f"id {row.values.get('id')!r} names none of {', '.join(GROUPS)}")

    def measures(self) -> Sequence[Measure]:
        """Overall accuracy over pairs, and the unweighted mean of the three groups."""
        points = majority if self.mode == "compat" else half_credit
        said = "more than half of the votes agree" if self.mode == "compat" else "most votes agree"
        return [
            Measure("overall", f"over pairs: {said}", mean_of(points), points, 0.5),
            Measure("mean over groups", "unweighted mean of general, hallucination, reasoning",
                    macro_of(points), points, 0.5),
            *comparison_measures(),
        ]  # fmt: skip


def majority(judged: Judged) -> Sequence[float]:
    """1 or 0 where more than half of all votes agree or reject; nothing otherwise."""
    agree, reject = judged.parts["agree"], judged.parts["reject"]
    total = agree + reject + judged.parts["unreadable"]
    if agree > total / 2:
        return [1.0]
    return [0.0] if reject > total / 2 else []


def _images(row: Row) -> tuple[Candidate, ...]:
    if row.values.get("image") is not None:
        return (row.picture("image"),)
    return (row.file(row.text("image_path")),)
