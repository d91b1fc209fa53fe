"""Benchmarks of answers in words: one adapter for every judge, votes, orders, official counts."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.reward_benchmarks.answer_files import (
    AnswerPairs,
    MMRLHFRewardBench,
    VideoRewardBench,
    VLRewardBench,
    VLRMBench,
)
from eval.reward_benchmarks.answers import AnswerJudge
from eval.reward_benchmarks.run import evaluate_rewards
from eval.reward_benchmarks.scoring import Settings
from vision_rewards.judge.backend import Query, Reply
from vision_rewards.judge.pairwise import PairwiseJudge


class Longer:
    """Answers the question by rule: the longer answer wins; ``bias`` characters for the first.

    An answer that holds ``mumble`` gets no readable verdict.
    """

    deterministic = True

    def __init__(self, bias: int = 0) -> None:
        self.bias = bias
        self.identity = f"longer-{bias}"
        self.queries: list[Query] = []

    def networks(self) -> Sequence[Any]:
        return ()

    def ask(self, queries: Sequence[Query]) -> list[Reply]:
        self.queries += queries
        return [Reply(text=self._answer(q.text)) for q in queries]

    def _answer(self, text: str) -> str:
        a, b = (re.search(rf"<answer_{x}>\n(.*)\n</answer_{x}>", text, re.DOTALL) for x in "ab")
        assert a is not None and b is not None
        if "mumble" in text:
            return "hard to say"
        ahead = len(a[1]) + self.bias >= len(b[1])
        return json.dumps({"reason": "longer", "winner": "A" if ahead else "B"})


def judge(bias: int = 0) -> PairwiseJudge:
    return PairwiseJudge(backend=Longer(bias), reasks=0)


def numbers(benchmark: Any, bias: int = 0, **options: Any) -> tuple[dict[str, float], Any]:
    report = evaluate_rewards(benchmark, {"j": judge(bias)}, **options)
    return {n: v.mean for n, v in report["j"].measures.items()}, report


def picture(folder: Path, name: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return name


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_each_pair_is_asked_once_in_each_order(tmp_path):
    picture(tmp_path, "a.png")
    row = {"prompt": "What is it?", "chosen": "a red square", "rejected": "red", "image": "a.png"}
    benchmark = AnswerPairs(write(tmp_path / "x.jsonl", [row]))
    backend = Longer()
    (judged,) = AnswerJudge(PairwiseJudge(backend=backend)).judge_items(
        benchmark.load().items, Settings()
    )
    texts = [q.text for q in backend.queries]
    assert len(texts) == 2 and all(len(q.images) == 1 for q in backend.queries)
    assert texts[0].index("a red square") < texts[0].index("red\n")
    assert texts[1].index("a red square") > texts[1].index("<answer_b>")
    assert judged.scores == (1.0, 0.0) and judged.orders == ((1.0, 1.0),)


def test_a_judge_that_likes_the_first_is_seen_through(tmp_path):
    """With a bias of 100 characters the first shown always wins: a split vote, no verdict."""
    rows = [{"question": "q", "chosen": "long enough", "rejected": "x"}] * 3
    benchmark = AnswerPairs(write(tmp_path / "x.jsonl", rows))
    fair, _ = numbers(benchmark)
    biased, _ = numbers(benchmark, bias=100)
    assert (fair["accuracy"], fair["same verdict in both orders"]) == (1, 1)
    assert (biased["accuracy"], biased["accuracy, ties half"]) == (0, 0.5)
    assert biased["same verdict in both orders"] == 0
    assert biased["position bias"] == pytest.approx(0.5)


def test_rewards_that_score_pictures_cannot_compare_answers(tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    benchmark = AnswerPairs(write(tmp_path / "x.jsonl", [row]))
    with pytest.raises(ValueError, match="answers in words are compared by judges only"):
        evaluate_rewards(benchmark, ["shapes_strict"])


def test_an_interrupted_run_of_answers_goes_on(tmp_path):
    rows = [{"prompt": str(k), "chosen": "longer", "rejected": "x"} for k in range(20)]
    rows[3]["chosen"] = "mumble"
    benchmark = AnswerPairs(write(tmp_path / "x.jsonl", rows))
    first, report = numbers(benchmark, out=tmp_path / "out")
    assert report["j"].unscored == 1 and first["accuracy"] == 1
    idle = Longer()
    again = evaluate_rewards(
        benchmark, {"j": PairwiseJudge(backend=idle, reasks=0)}, tmp_path / "out"
    )
    assert len(idle.queries) == 2  # only the unreadable one is asked about again
    assert again["j"].measures == report["j"].measures


def test_broken_rows_of_answers_are_named(tmp_path):
    good = {"prompt": "q", "chosen": "long", "rejected": "x"}
    file = write(tmp_path / "x.jsonl", [good, {"prompt": "q"}, good | {"image": "gone.png"}])
    file.write_text(file.read_text() + "{torn\n")
    loaded = AnswerPairs(file).load()
    assert len(loaded.items) == 1
    assert "no 'chosen'; the row has prompt" in loaded.problems[0]
    assert "gone.png is not below" in loaded.problems[1]
    assert "row 4: it is not JSON" in loaded.problems[2]


def test_other_column_names_can_be_given(tmp_path):
    row = {"q": "?", "good": "long", "bad": "x", "kind": "maths"}
    fields = {"prompt": "q", "chosen": "good", "rejected": "bad", "category": "kind"}
    (item,) = AnswerPairs(write(tmp_path / "x.jsonl", [row]), fields=fields).load().items
    assert (item.prompt, item.candidates[0].text, item.category) == ("?", "long", "maths")


# --- VL-RewardBench ---------------------------------------------------------------------------


def vl(identity: str, chosen: str, rejected: str, swap: bool = False) -> dict[str, Any]:
    both = [rejected, chosen] if swap else [chosen, rejected]
    return {"id": identity, "query": "q", "response": both, "ranking": [1, 0] if swap else [0, 1],
            "image_path": "images/a.png"}  # fmt: skip


def test_vl_reward_bench_majorities(tmp_path):
    """Right in two groups, wrong in one, one without a readable vote: 3 of 4 and a macro mean."""
    picture(tmp_path, "images/a.png")
    rows = [vl("RLAIF-V-1", "longer", "x"), vl("povid-2", "longer", "x", swap=True),
            vl("wildvision-battle-3", "x", "longer"), vl("mmmu-4", "longer", "x"),
            vl("mmmu-5", "mumble", "x"), vl("other-6", "longer", "x")]  # fmt: skip
    rows.append(vl("mmmu-7", "longer", "x") | {"ranking": [1, 1]})
    benchmark = VLRewardBench(write(tmp_path / "data.jsonl", rows))
    found, report = numbers(benchmark)
    assert found["overall"] == pytest.approx(3 / 4)
    assert found["mean over groups"] == pytest.approx((1 + 0 + 1) / 3)
    assert report["j"].unscored == 1
    assert {c: v.mean for c, v in report["j"].categories.items()} == {
        "hallucination": 1, "general": 0, "reasoning": 1
    }  # fmt: skip
    assert "'other-6' names none of" in report.problems[0]
    assert "the ranking must be [0, 1] or [1, 0]" in report.problems[1]


def test_split_votes_are_left_out_or_count_one_half(tmp_path):
    """A judge that always takes the first: what the drawn orders make of it is known."""
    picture(tmp_path, "images/a.png")
    rows = [vl(f"mmmu-{k}", "same", "same") for k in range(12)]
    write(tmp_path / "data.jsonl", rows)
    items = VLRewardBench(tmp_path).load().items
    asker = AnswerJudge(judge(), votes=10, order="random")
    ahead = [sum(asker._first_ahead(i, v) for v in range(10)) for i in items]
    judged = asker.judge_items(items, Settings())
    assert [j.parts["agree"] for j in judged] == ahead
    assert 5 in ahead and len(set(ahead)) > 2
    compat, _ = numbers(VLRewardBench(tmp_path))
    fixed, _ = numbers(VLRewardBench(tmp_path, "fixed"))
    decided = [a > 5 for a in ahead if a != 5]
    assert compat["overall"] == pytest.approx(sum(decided) / len(decided))
    assert fixed["overall"] == pytest.approx((sum(decided) + ahead.count(5) / 2) / 12)


def test_votes_of_more_than_two_are_sampled(tmp_path):
    picture(tmp_path, "images/a.png")
    write(tmp_path / "data.jsonl", [vl("mmmu-1", "longer", "x")])
    backend = Longer()
    asker = AnswerJudge(PairwiseJudge(backend=backend), votes=3)
    asker.judge_items(VLRewardBench(tmp_path).load().items, Settings())
    assert [q.temperature for q in backend.queries] == [0.7] * 3
    assert [q.seed for q in backend.queries] == [0, 1, 2]
    assert asker.identity != AnswerJudge(PairwiseJudge(backend=backend)).identity


def test_vl_reward_bench_in_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format="PNG")
    row = vl("mathverse_1", "longer", "x") | {"image": {"bytes": buffer.getvalue(), "path": "a"}}
    row["human_ranking"] = row.pop("ranking")
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "test-0.parquet")
    (item,) = VLRewardBench(tmp_path).load().items
    assert item.context["images"][0].open().size == (8, 8)
    assert item.category == "reasoning"


# --- the others -------------------------------------------------------------------------------


def test_mm_rlhf_reward_bench_counts_pairs_and_questions(tmp_path):
    """Question 1: both right; 2: one of two; 3: its only pair is wrong; 4: one is unreadable."""
    rows = []
    for question, category, pair in (
        ("1", "mcq", ("longer", "x")), ("1", "mcq", ("longer", "x")),
        ("2", "safety", ("longer", "x")), ("2", "safety", ("x", "longer")),
        ("3", "safety", ("x", "longer")),
        ("4", "safety", ("longer", "x")), ("4", "safety", ("mumble", "x")),
    ):  # fmt: skip
        image = picture(tmp_path, f"{category}/{question}.png")
        rows.append({"id": question, "prompt": "q", "chosen": pair[0], "rejected": pair[1],
                     "image": image})  # fmt: skip
    write(tmp_path / "mm_reward_bench.jsonl", rows)
    found, report = numbers(MMRLHFRewardBench(tmp_path))
    assert found["ACC"] == pytest.approx(4 / 6)
    assert found["ACC+"] == pytest.approx(1 / 3)
    assert {c: v.mean for c, v in report["j"].categories.items()} == {
        "mcq": 1, "safety": 0.5
    }  # fmt: skip


def test_vlrm_bench_takes_its_comparison(tmp_path):
    row = {"id": 1, "image": [picture(tmp_path, "a.png"), picture(tmp_path, "b.png")],
           "question": "q", "step_list": ["one", "two"], "reasoning_error": ["x"]}  # fmt: skip
    write(tmp_path / "multi_solution.jsonl", [row])
    benchmark = VLRMBench(tmp_path)
    (item,) = benchmark.load().items
    assert item.candidates[0].text == "1. one\n2. two" and len(item.context["images"]) == 2
    assert numbers(benchmark)[0]["accuracy"] == 1


def test_video_reward_bench_shows_frames(tmp_path):
    for k in range(5):
        picture(tmp_path, f"v/{k}.png")
    row = {"question": "q", "chosen": "longer", "rejected": "x", "video": "v",
           "category": "safety"}  # fmt: skip
    benchmark = VideoRewardBench(write(tmp_path / "x.jsonl", [row, {**row, "video": None}]))
    loaded = benchmark.load()
    assert "no 'video'" in loaded.problems[0]
    backend = Longer()
    AnswerJudge(PairwiseJudge(backend=backend)).judge_items(loaded.items, Settings(frames=3))
    assert [len(q.images) for q in backend.queries] == [3, 3]
