"""Readers of published benchmarks, on small files in their official formats."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.reward_benchmarks.base import DataError
from eval.reward_benchmarks.edit_reward import EditRewardBench
from eval.reward_benchmarks.genai import GenAIBench
from eval.reward_benchmarks.pick_a_pic import PickAPic
from eval.reward_benchmarks.rankings import Hpdv2, ImageRewardTest
from eval.reward_benchmarks.run import data_digest, evaluate_rewards
from eval.reward_benchmarks.scoring import Settings, judge_items
from eval.reward_benchmarks.video import read_video
from eval.reward_benchmarks.videogen import VideoGenRewardBench
from eval.reward_benchmarks.videoscore import VideoScoreBench
from mmalign.pictures import PictureError
from mmalign.reward_info import RewardInfo
from mmalign.runtime.extras import MissingExtraError
from mmalign.types import Media, Score

parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'parquet'")
arrow = pytest.importorskip("pyarrow")


def png(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path


class Level:
    """Brightness in [0, 255], of pictures and videos, with parts where asked for."""

    def __init__(self, **parts: float) -> None:
        self.info = RewardInfo(name="level", needs=(), media=("image", "video"))
        self.parts = parts
        self.sizes: list[tuple[int, ...]] = []

    identity = "level@1"

    def score(self, media: Media, prompts: Any, context: Any = None) -> Score:
        self.sizes += [tuple(media.data.shape[1:])] * len(media)
        value = 255 * media.data.flatten(1).mean(1)
        parts = {name: sign * value for name, sign in self.parts.items()}
        return Score(value, torch.ones(len(value), dtype=torch.bool), parts, (), self.identity)


def numbers(benchmark: Any, reward: Any = None, **options: Any) -> dict[str, float]:
    report = evaluate_rewards(benchmark, {"r": reward or Level()}, **options)
    return {name: value.mean for name, value in report["r"].measures.items()}


# --- Pick-a-Pic -------------------------------------------------------------------------------


def pick(a: int, b: int, label: float, **more: Any) -> dict[str, Any]:
    return {"caption": "a cat", "jpg_0": png(a), "jpg_1": png(b), "label_0": label,
            "label_1": 1 - label, "model_0": "x", "model_1": "y", **more}  # fmt: skip


class LogOdds(Level):
    """A score whose softmax is moderate, so that thresholds matter."""

    def score(self, media: Media, prompts: Any, context: Any = None) -> Score:
        return Score.of(super().score(media, prompts).value / 100, self.identity)


def test_pick_a_pic_with_its_threshold_from_validation(tmp_path):
    """Differences of 0.2 and 2 in log-odds: tanh(0.1) = 0.0997 and tanh(1) = 0.76.

    On validation the small one is a human tie, so the threshold is 0.1; on test the points are 1
    (right), 1/2 (a tie predicted), 1 (both tied), 0 (wrong).
    """
    test = [pick(210, 10, 1), pick(60, 40, 1), pick(60, 40, 0.5), pick(210, 10, 0)]
    write_parquet(tmp_path / "test_unique-0.parquet", test)
    write_parquet(tmp_path / "validation_unique-0.parquet", [pick(60, 40, 0.5), pick(210, 10, 1)])
    found = numbers(PickAPic(tmp_path), LogOdds())
    assert found["points"] == pytest.approx(2.5 / 4)
    assert found["accuracy"] == pytest.approx(2 / 3)
    without = numbers(PickAPic(tmp_path, threshold=0.0), LogOdds())
    assert without["points"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)


def test_pick_a_pic_names_broken_rows(tmp_path):
    rows = [pick(9, 1, 1), pick(9, 1, 0.7), pick(9, 1, 1, caption=None), pick(8, 1, 1)]
    rows[3]["jpg_0"] = b"torn"
    rows.append(pick(8, 2, 1, has_label=False))
    rows = [{"has_label": True, **row} for row in rows]
    loaded = PickAPic(write_parquet(tmp_path / "a.parquet", rows)).load()
    assert len(loaded.items) == 2
    assert loaded.problems[0].startswith("a.parquet, row 2: label_0 and label_1 must be 1 and 0")
    assert loaded.problems[1].startswith("a.parquet, row 3: no 'caption'; the row has")
    report = evaluate_rewards(PickAPic(tmp_path / "a.parquet"), {"r": Level()})
    assert report["r"].unscored == 1 and report["r"].items == 2
    (reason,) = report["r"].reasons
    assert reason.startswith("a.parquet, row group 1, row 1, jpg_0: UnidentifiedImageError")
    bare = [{"caption": "a cat", "label_0": 1.0, "label_1": 0.0}]
    with pytest.raises(DataError, match="use pickapic_v1, not"):
        PickAPic(write_parquet(tmp_path / "b.parquet", bare)).load()


def test_the_same_picture_in_two_rows_is_scored_once(tmp_path):
    rows = [pick(9, k, 1) for k in range(5)]
    reward = Level()
    numbers(PickAPic(write_parquet(tmp_path / "a.parquet", rows)), reward)
    assert len(reward.sizes) == 6


# --- rankings ---------------------------------------------------------------------------------


@pytest.fixture
def greys(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for level in (10, 50, 90, 200):
        (tmp_path / "images" / f"{level}.png").write_bytes(png(level))
    return tmp_path


def test_hpdv2_counts_inversions(greys):
    """Ranks 1, 3, 2 against brightness 1, 2, 3: one inversion of three pairs."""
    names = ["200.png", "90.png", "50.png"]
    rows = [
        {"prompt": "p", "image_path": names, "rank": [1, 3, 2], "raw_annotations": []},
        {"prompt": "q", "image_path": names, "rank": [1, 1, 2]},
    ]
    (greys / "test.json").write_text(json.dumps(rows))
    found = numbers(Hpdv2(greys))
    assert found["agreement"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["accuracy"] == pytest.approx(4 / 5)
    assert found["best chosen"] == 1
    same = lambda images, prompts: [1.0] * len(prompts)  # noqa: E731
    blind = numbers(Hpdv2(greys / "test.json"), same)
    assert blind["agreement"] == pytest.approx((2 / 3 + 1) / 2)  # in the order of the file
    assert blind["accuracy, ties half"] == 0.5
    assert numbers(Hpdv2(greys, "fixed"), same)["agreement"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_image_reward_pools_pairs_over_rankings(greys):
    """Of four pictures five pairs are ordered, all rightly; one more pair is wrong: 5 of 6."""
    four = ["200.png", "90.png", "50.png", "10.png"]
    rows = [
        {"id": "a", "prompt": "p", "generations": four, "ranking": [1, 2, 2, 3]},
        {"id": "b", "prompt": "q", "generations": ["10.png", "200.png"], "ranking": [1, 2]},
        {"id": "c", "prompt": "q", "generations": ["10.png", "gone.png"], "ranking": [1, 2]},
        {"id": "d", "prompt": "q", "generations": ["10.png", "50.png"], "ranking": [1]},
    ]
    (greys / "test.json").write_text(json.dumps(rows))
    benchmark = ImageRewardTest(greys)
    assert numbers(benchmark)["accuracy"] == pytest.approx(5 / 6)
    problems = benchmark.load().problems
    assert "gone.png is not below" in problems[0] and "must be a list of 2" in problems[1]


# --- GenAI-Bench ------------------------------------------------------------------------------


def vote(a: int, b: int, kind: str) -> dict[str, Any]:
    return {"prompt": "p", "left_image": {"bytes": png(a), "path": None},
            "right_image": {"bytes": png(b), "path": None}, "left_model": "x",
            "right_model": "y", "vote_type": kind}  # fmt: skip


def test_genai_bench_votes(tmp_path):
    """Right, wrong, and of the two kinds of ties one met; then one that cannot be read."""
    rows = [vote(9, 1, "leftvote"), vote(9, 1, "rightvote"), vote(5, 5, "bothbad_vote"),
            vote(9, 1, "tievote")]  # fmt: skip
    file = write_parquet(tmp_path / "image_generation" / "test.parquet", rows)
    found = numbers(GenAIBench(tmp_path))
    assert found["vote accuracy"] == 0.5
    assert found["accuracy"] == 0.5
    torn = vote(9, 1, "leftvote") | {"left_image": {"bytes": b"torn", "path": None}}
    write_parquet(file, [*rows, torn, vote(9, 1, "perhaps")])
    assert numbers(GenAIBench(tmp_path))["vote accuracy"] == pytest.approx(2 / 5)
    assert numbers(GenAIBench(tmp_path, "fixed"))["vote accuracy"] == pytest.approx(2 / 4)
    assert "vote_type must be one of leftvote" in GenAIBench(tmp_path).load().problems[0]
    with pytest.raises(DataError, match="unknown; use image_generation"):
        GenAIBench(tmp_path, task="images")


def test_genai_bench_edits_have_a_source(tmp_path):
    row = {"instruct_prompt": "brighter", "source_image": {"bytes": png(3)},
           "left_output_image": {"bytes": png(9)}, "right_output_image": {"bytes": png(1)},
           "vote_type": "leftvote"}  # fmt: skip
    write_parquet(tmp_path / "image_edition" / "a.parquet", [row])
    (item,) = GenAIBench(tmp_path, task="image_edition").load().items
    assert item.prompt == "brighter" and item.context["source"].open().getpixel((0, 0))[0] == 3

    class Closer(Level):
        """Nearer to the source is better."""

        def score(self, media: Media, prompts: Any, context: Any = None) -> Score:
            value = super().score(media, prompts).value
            source = torch.tensor([float(c["source"].getpixel((0, 0))[0]) for c in context])
            return Score.of(-(value - source).abs(), self.identity)

    (judged,) = judge_items(Closer(), [item], Settings())
    assert judged.scores == pytest.approx((-6, -2))


# --- EditReward-Bench -------------------------------------------------------------------------


def edit(a: int, b: int, task: str, dimension: str, **more: Any) -> dict[str, Any]:
    source = {"bytes": png(7, (6, 4))}
    return {"key": [f"k{a}", f"k{b}"], "instruction": "do", "input_image": source,
            "output_images": [{"bytes": png(a)}, {"bytes": png(b)}], "task_type": task,
            "dimension": dimension, **more}  # fmt: skip


def test_edit_reward_bench_is_a_mean_over_tasks(tmp_path):
    """Task a: right, right, tied; task b: wrong. Mean of 2/3 and 0."""
    rows = [edit(9, 1, "a", "overall"), edit(8, 1, "a", "overall"), edit(5, 5, "a", "overall"),
            edit(1, 9, "b", "overall"), edit(9, 1, "b", "consistency"),
            edit(9, 1, "b", "style")]  # fmt: skip
    benchmark = EditRewardBench(write_parquet(tmp_path / "bench.parquet", rows))
    reward = Level(consistency=-1.0)
    found = numbers(benchmark, reward)
    assert found["overall"] == pytest.approx(1 / 3)
    assert found["consistency"] == 0  # the part of that name says the opposite of the value
    assert set(reward.sizes) == {(3, 4, 6)}  # the size of the source
    assert len(reward.sizes) == 4  # levels 9, 8, 5, 1, once each
    assert "dimension must be one of overall" in benchmark.load().problems[0]


# --- videos -----------------------------------------------------------------------------------


def frames(folder: Path, *levels: int) -> Path:
    folder.mkdir(parents=True)
    for k, level in enumerate(levels):
        (folder / f"{k}.png").write_bytes(png(level))
    return folder


def test_frames_are_spread_over_the_video(tmp_path):
    video = read_video(frames(tmp_path / "v", *range(0, 110, 10)), 3)
    assert (255 * video.mean((1, 2, 3))).round().tolist() == [0, 50, 100]
    assert read_video(tmp_path / "v", 50).shape == (11, 3, 8, 8)
    stills = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (0, 100, 200)]
    stills[0].save(tmp_path / "v.png", save_all=True, append_images=stills[1:])
    moving = read_video(tmp_path / "v.png", 8)
    assert (255 * moving.mean((1, 2, 3))).round().tolist() == [0, 100, 200]
    (tmp_path / "torn.gif").write_bytes(b"torn")
    with pytest.raises(PictureError, match=r"torn\.gif"):
        read_video(tmp_path / "torn.gif")


def test_video_files_are_read_or_say_what_to_install(tmp_path):
    try:
        import av  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        (tmp_path / "v.mp4").write_bytes(b"anything")
        with pytest.raises(MissingExtraError, match=r"mmalign\[video\]"):
            read_video(tmp_path / "v.mp4")
        return
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for level in (0, 100, 200):
            picture = np.full((32, 32, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    read = read_video(tmp_path / "v.mp4", 3)
    assert read.shape == (3, 3, 32, 32)
    assert (255 * read.mean((1, 2, 3))).tolist() == pytest.approx([0, 100, 200], abs=6)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_videogen_reward_bench(tmp_path):
    """Brightness 90 > 50 > 10; MQ by a part of the opposite sign."""
    for level in (10, 50, 90):
        frames(tmp_path / "videos" / f"{level}", level, level)
    row = {"path_A": "videos/90", "path_B": "videos/10", "A_model": "x", "B_model": "y",
           "prompt": "p", "VQ": "A", "MQ": "A", "TA": "same", "Overall": "A"}  # fmt: skip
    rows = [row, row | {"path_A": "videos/50", "Overall": "same"},
            row | {"path_A": "videos/10", "path_B": "videos/50"},
            row | {"path_A": "videos/99"}, row | {"TA": "maybe"}]  # fmt: skip
    benchmark = VideoGenRewardBench(write_csv(tmp_path / "videogen-rewardbench.csv", rows))
    reward = Level(MQ=-1.0)
    found = numbers(benchmark, reward)
    assert reward.sizes == [(2, 3, 8, 8)] * 3
    assert found["Overall without ties"] == 0.5
    # Differences 80 (A), 40 (tie), -40 (A): at 40 both smaller ones are ties, one of them rightly.
    assert found["Overall with ties"] == pytest.approx(2 / 3)
    assert found["VQ without ties"] == pytest.approx(2 / 3)
    assert found["MQ without ties"] == pytest.approx(1 / 3)
    assert "TA without ties" not in found and found["TA with ties"] == 1
    problems = benchmark.load().problems
    assert "videos/99 is not below" in problems[0] and "TA must be one of A, B, same" in problems[1]


def test_videogen_ties_differ_between_the_modes(tmp_path):
    """Equal differences: the script lets the first of them be a tie and the second not."""
    frames(tmp_path / "a", 90), frames(tmp_path / "b", 10)
    row = {"path_A": "a", "path_B": "b", "prompt": "p", "VQ": 0, "MQ": 0, "TA": 0, "Overall": 0}
    write_csv(tmp_path / "x.csv", [row, row | {"Overall": 1}])
    found = [numbers(VideoGenRewardBench(tmp_path, m))["Overall with ties"]
             for m in ("compat", "fixed")]  # fmt: skip
    assert found == [1.0, 0.5]


def test_videoscore_bench(tmp_path):
    """Scores 1, 2.4, 5, 7 stand for 1, 2, 5, 5; ratings 1, 3, 5, 4 of visual quality."""
    ratings = {10: 1, 24: 3, 50: 5, 70: 4}
    rows = []
    for level, rating in ratings.items():
        frames(tmp_path / "videos" / f"{level}", level)
        rows.append({"video_name": f"{level}", "t2v_prompt": "p", "v_score_gt": rating,
                     "t_score_gt": 3, "p_score_gt": 6 - rating})  # fmt: skip
    rows.append(rows[0] | {"v_score_gt": 9})
    rows.append(rows[0] | {"p_score_gt": None})
    (tmp_path / "test.json").write_text(json.dumps(rows))
    benchmark = VideoScoreBench(tmp_path, scale=(10, 50))
    found = numbers(benchmark)
    # Exact: 2 of 4, 0 of 4, 0 of 4. Within 1: all 4; only the 2.4; that 2 and 3, no other.
    assert found["accuracy, visual quality"] == 0.5
    assert found["accuracy"] == pytest.approx(2 / 12)
    assert found["accuracy within 1"] == pytest.approx((4 + 1 + 1) / 12)
    assert found["SRCC, visual quality"] == pytest.approx(0.8)
    assert found["KRCC, visual quality"] == pytest.approx(4 / 6)
    assert found["SRCC, physical consistency"] == pytest.approx(-0.8)
    assert "SRCC, text alignment" not in found  # constant ratings have no correlation
    problems = benchmark.load().problems
    assert "must lie in [1, 5], got 9" in problems[0] and "no 'p_score_gt'" in problems[1]


# --- files ------------------------------------------------------------------------------------


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no data was given; give test"):
        Hpdv2()
    with pytest.raises(DataError, match="does not exist"):
        Hpdv2(tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds no test\.json"):
        Hpdv2(tmp_path).load()
    (tmp_path / "test.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        Hpdv2(tmp_path).load()
    (tmp_path / "a.parquet").write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        PickAPic(tmp_path / "a.parquet").load()
    with pytest.raises(DataError, match="mode='best' is unknown"):
        PickAPic(tmp_path, "best")  # type: ignore[arg-type]


def test_the_report_says_which_data(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [pick(9, 1, 1)])
    before = data_digest(file)
    assert before is not None and before.startswith("a.parquet ")
    assert evaluate_rewards(PickAPic(file), {"r": Level()}).provenance["data"] == before
    write_parquet(file, [pick(9, 2, 1)])
    assert data_digest(file) != before
    assert data_digest(tmp_path) != data_digest(file)
