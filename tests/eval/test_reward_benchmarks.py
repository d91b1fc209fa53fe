"""The harness of reward benchmarks: what is asked how often, what is counted, what is resumed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from eval.reward_benchmarks.base import DataError, RewardBenchmark, RowError
from eval.reward_benchmarks.items import Candidate, Item, Judged, bytes_candidate
from eval.reward_benchmarks.measures import (
    Measure,
    comparison_measures,
    macro_of,
    mean_of,
    pair_measures,
    strict,
)
from eval.reward_benchmarks.page import markdown, page_of
from eval.reward_benchmarks.result import RewardReport
from eval.reward_benchmarks.run import UnfitError, compare, evaluate_rewards
from eval.reward_benchmarks.scoring import Settings, judge_items, unscored
from mmalign.reward_info import RewardInfo
from mmalign.scoring import JournalError
from mmalign.types import Media, Score


def grey(level: int, side: int = 8) -> Candidate:
    return Candidate(f"grey {level}", lambda: Image.new("RGB", (side, side), (level,) * 3))


class Brightness:
    """Mean of the pixels; keeps every level it was asked about, and stops after ``lasts``."""

    def __init__(self, lasts: int = 10**9, **info: Any) -> None:
        self.info = RewardInfo(name="brightness", needs=(), **info)
        self.asked: list[int] = []
        self.lasts = lasts

    @property
    def identity(self) -> str:
        return "brightness@1"

    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        if len(self.asked) + len(media) > self.lasts:
            raise KeyboardInterrupt
        levels = media.data.flatten(1).mean(1)
        self.asked += [round(255 * v) for v in levels.tolist()]
        return Score.of(levels, self.identity)


class FirstWins(Brightness):
    """A comparison that likes the first picture and, half as much, the brighter one."""

    def __init__(self) -> None:
        super().__init__(scope="pairwise")

    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        own = super().score(media, prompts).value
        assert context is not None
        other = torch.tensor([c["opponent"].getpixel((0, 0))[0] / 255 for c in context])
        return Score.of(0.6 + 0.2 * torch.sign(own - other), self.identity)


class Among(Brightness):
    """Rank within the group, which has to be whole."""

    def __init__(self) -> None:
        super().__init__(scope="group")
        self.sizes: list[int] = []

    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        own = super().score(media, prompts).value
        groups = [c["group"] for c in context or ()]
        self.sizes.append(max(groups.count(g) for g in groups))
        return Score.of(torch.stack([(own < v).float().mean() for v in own]), self.identity)


class Greys(RewardBenchmark):
    """Brighter is better; items are given."""

    name = "greys"

    def __init__(self, *items: Item, broken: int = 0, media: str = "image") -> None:
        super().__init__()
        self.items, self.broken = items, broken
        self.media = media  # type: ignore[assignment]

    def rows(self) -> Any:
        def fail() -> list[Item]:
            raise RowError("no 'prompt'; the row has nothing")

        for k in range(self.broken):
            yield f"row {k}", fail
        for item in self.items:
            yield item.key, lambda item=item: [item]

    def measures(self) -> list[Measure]:
        macro = Measure("macro", "over categories", macro_of(strict), strict, 0.5)
        return [*pair_measures(), macro, *comparison_measures()]


def pair(key: str, a: int, b: int, truth: tuple[float, float] = (1, 0), **more: Any) -> Item:
    made = (grey(a), grey(b))
    return Item(key=key, prompt=more.pop("prompt", key), candidates=made, truth=truth, **more)


def run(*items: Item, reward: Any = None, **options: Any) -> tuple[RewardReport, Any]:
    reward = reward or Brightness()
    return evaluate_rewards(Greys(*items), {"it": reward}, **options), reward


def test_every_picture_is_scored_once_for_a_prompt():
    same = {"prompt": "a"}
    items = [pair("1", 200, 100, **same), pair("2", 200, 50, **same), pair("3", 100, 50, **same)]
    report, reward = run(*items, pair("4", 200, 100, prompt="b"))
    assert sorted(reward.asked) == [50, 100, 100, 200, 200]
    assert report["it"].measures["accuracy"].mean == 1


def test_accuracies_by_hand():
    """Right, wrong and tied, of three pairs that people ordered; their own tie takes no part."""
    items = [
        pair("1", 200, 100),
        pair("2", 50, 100),
        pair("3", 90, 90),
        pair("4", 1, 9, (0.5, 0.5)),
    ]
    measures = run(*items)[0]["it"].measures
    assert measures["accuracy"].mean == pytest.approx(1 / 3)
    assert measures["accuracy, ties half"].mean == pytest.approx(1 / 2)
    assert measures["accuracy"].n == 3


def test_the_mean_over_categories_weighs_them_alike():
    items = [pair(f"a{k}", 200, 100, category="a") for k in range(4)]
    report = run(*items, pair("b0", 50, 100, category="b"))[0]
    row = report["it"]
    assert row.measures["accuracy"].mean == pytest.approx(4 / 5)
    assert row.measures["macro"].mean == pytest.approx(1 / 2)
    assert {c: v.mean for c, v in row.categories.items()} == {"a": 1, "b": 0}


def test_comparisons_are_asked_in_both_orders():
    """First shown 0.8 or 0.4: the preference for the brighter one is (0.8 + 0.6) / 2 = 0.7."""
    items = [pair("1", 200, 100), pair("2", 50, 100)]
    report, reward = run(*items, reward=FirstWins())
    assert sorted(reward.asked) == [50, 100, 100, 200]
    judged = judge_items(FirstWins(), items, Settings())
    assert [j.scores[0] for j in judged] == pytest.approx([0.7, 0.3])
    assert judged[0].orders[0] == pytest.approx((0.8, 0.6))
    measures = report["it"].measures
    assert measures["accuracy"].mean == 0.5
    assert measures["position bias"].mean == pytest.approx(0.1)
    # Shown second, the darker one is preferred with 0.6, shown first with 0.4.
    assert measures["same verdict in both orders"].mean == 1.0


def test_a_comparison_ranks_more_than_two():
    made = tuple(grey(v) for v in (10, 200, 100))
    item = Item(key="1", prompt="p", candidates=made, truth=(1, 3, 2), form="ranking")
    (judged,) = judge_items(FirstWins(), [item], Settings())
    assert judged.scores == pytest.approx((0.3, 0.7, 0.5))
    assert strict(judged) == [1, 1, 1]


def test_a_group_is_scored_whole():
    made = tuple(grey(v) for v in range(10, 100, 10))
    items = [
        Item(key=str(k), prompt="p", candidates=made[: k + 2], truth=tuple(range(k + 2)),
             form="ranking")
        for k in range(7)
    ]  # fmt: skip
    reward = Among()
    judged = judge_items(reward, items, Settings(batch_size=2))
    assert all(strict(j) == [1] * len(strict(j)) for j in judged)
    assert max(reward.sizes) == 8


def test_unscored_items_are_counted_and_never_zero():
    torn = bytes_candidate(b"no picture")
    lost = Item(key="2", prompt="p", candidates=(torn, grey(5)), truth=(1, 0))
    report, _ = run(pair("1", 200, 100), lost)
    row = report["it"]
    assert (row.items, row.unscored) == (2, 1)
    assert row.measures["accuracy"].mean == 1 and row.measures["accuracy"].n == 1
    assert "UnidentifiedImageError" in next(iter(row.reasons))
    assert "Unscored" in markdown(report) and "1 of 2" in markdown(report)


def test_reasons_are_grouped_by_what_they_say():
    item = pair("1", 2, 1)
    notes = ["55% specks", "43% specks", "torn", "no JSON; the last one was: 'a'",
             "no JSON; the last one was: 'b'"]  # fmt: skip
    lost = [Judged(item, (math.nan, 1.0), note=n) for n in notes]
    found = unscored([*lost, Judged(item, (1.0, 0.0))])
    assert found == {"55% specks": 2, "torn": 1, "no JSON; the last one was: 'a'": 2}


def test_a_reward_that_raises_leaves_its_batch_unscored():
    def picky(images: Any, prompts: Sequence[str]) -> list[float]:
        if "bad" in prompts:
            raise RuntimeError("out of paint")
        return [1.0] * len(prompts)

    report = evaluate_rewards(
        Greys(pair("1", 3, 2, prompt="bad"), pair("2", 3, 2)), {"picky": picky},
        settings=Settings(batch_size=2),
    )  # fmt: skip
    assert report["picky"].unscored == 1
    assert "out of paint" in next(iter(report["picky"].reasons))


def test_an_interrupted_run_goes_on(tmp_path):
    items = [pair(str(k), 2 * k + 1, 2 * k) for k in range(30)]
    settings = Settings(batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        run(*items, reward=Brightness(lasts=40), out=tmp_path, settings=settings)
    report, rest = run(*items, out=tmp_path, settings=settings)
    assert 0 < len(rest.asked) < 60
    again, idle = run(*items, out=tmp_path, settings=settings)
    assert idle.asked == []
    assert again["it"].measures == report["it"].measures == run(*items)[0]["it"].measures


def test_answers_of_another_reward_are_refused(tmp_path):
    run(pair("1", 2, 1), out=tmp_path)
    with pytest.raises(JournalError, match="another reward"):
        run(pair("1", 2, 1), out=tmp_path, reward=lambda images, prompts: [1.0] * len(prompts))
    run(pair("1", 2, 1), out=tmp_path, reward=lambda images, prompts: [1.0] * len(prompts),
        overwrite=True)  # fmt: skip


@pytest.mark.parametrize(
    ("reward", "items", "media", "message"),
    [
        ("shapes_clip", [pair("1", 2, 1)], "video", "takes image, but greys holds videos"),
        ("dino_i", [pair("1", 2, 1)], "image", r"needs context\['reference'\]"),
        ("pairwise_judge", [Item(key="1", prompt="p", candidates=(grey(1),), truth=(3,),
                                 form="rating")], "image", "compares"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_any_work(reward, items, media, message):
    """Nothing is loaded: the checkpoints of the last two are not even here."""
    with pytest.raises(UnfitError, match=message):
        evaluate_rewards(Greys(*items, media=media), ["sharpness", reward])


def test_rewards_are_ranked_with_a_paired_test():
    items = [pair(str(k), 200 - k, 100) for k in range(20)]
    rewards: dict[str, Callable[..., Any]] = {
        "darkness": lambda images, prompts: [-i.getpixel((0, 0))[0] for i in images],
        "brightness": lambda images, prompts: [i.getpixel((0, 0))[0] for i in images],
    }
    report = evaluate_rewards(Greys(*items), rewards)
    assert [row.label for row in report.rows] == ["brightness", "darkness"]
    assert report.rows[0].p_value is None
    assert report.rows[1].p_value is not None and report.rows[1].p_value < 0.001
    assert report.rows[1].shared == 20


def test_the_paired_test_uses_items_that_both_scored():
    items = [pair(str(k), 2, 1) for k in range(4)]
    right = [Judged(i, (1.0, 0.0)) for i in items]
    wrong = [Judged(i, (0.0, 1.0) if k else (math.nan, 1.0)) for k, i in enumerate(items)]
    p, shared = compare(right, wrong, Measure("m", "", mean_of(strict), strict))
    assert shared == 3 and p == pytest.approx(2 / 8)


def test_broken_rows_are_named_and_a_limit_counts_usable_ones():
    benchmark = Greys(*(pair(str(k), 2, 1) for k in range(5)), broken=2)
    loaded = benchmark.load(3)
    assert [i.key for i in loaded.items] == ["0", "1", "2"]
    assert loaded.problems == ("row 0: no 'prompt'; the row has nothing",
                               "row 1: no 'prompt'; the row has nothing")  # fmt: skip
    with pytest.raises(DataError, match="no usable row"):
        Greys(broken=1).load()
    with pytest.raises(DataError, match="limit must be 1 or more"):
        benchmark.load(0)
    with pytest.raises(DataError, match="occurs twice"):
        Greys(pair("1", 2, 1), pair("1", 3, 1)).load()


def test_a_report_is_written_and_read_back(tmp_path):
    items = [pair(str(k), 200, k, category="ab"[k % 2]) for k in range(12)]
    report = run(*items, out=tmp_path)[0]
    read = RewardReport.load(tmp_path / "result.json")
    assert read.to_json() == report.to_json()
    assert read.provenance["items"] == 12 and "torch" in read.provenance["versions"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page == page_of(report) and "<script" not in page and "100.0 %" in page
    assert "12 judgements of 12 prompts" in page
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| it | 100.0 % [" in table and "by category" in table
    lines = (tmp_path / "items" / "it.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12


def test_a_part_named_like_the_dimension_answers():
    class Two(Brightness):
        def score(self, media, prompts, context=None):  # type: ignore[no-untyped-def]
            whole = super().score(media, prompts)
            return Score(whole.value, whole.valid, {"dark": -whole.value}, (), self.identity)

    items = [pair("1", 200, 100), pair("2", 200, 100, dimension="dark")]
    judged = judge_items(Two(), items, Settings())
    assert [strict(j) for j in judged] == [[1], [0]]


def test_pictures_are_resized_where_the_benchmark_says_so():
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(buffer, format="PNG")
    made = Candidate("k", buffer.getvalue(), size=(6, 4))
    assert made.open().size == (6, 4) and made.id == "k@6x4"


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 labels, 2 candidates"):
        pair("1", 2, 1, truth=(1, 0, 0))  # type: ignore[arg-type]
    with pytest.raises(UnfitError, match="no rewards were given"):
        evaluate_rewards(Greys(pair("1", 2, 1)), {})
