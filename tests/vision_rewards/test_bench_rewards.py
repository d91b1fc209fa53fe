"""The benchmark of rewards measures what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.cli import main
from mmalign.commands.bench import rewards_summary
from mmalign.config import ConfigError
from mmalign.reward_info import RewardInfo
from mmalign.types import Media, Score
from vision_rewards.bench import bench_rewards


def test_rates_flops_and_memory(clip_folder: Path) -> None:
    result = bench_rewards(
        ["jpeg_compressibility", f"clip_score@{clip_folder}"],
        batch_sizes=[1, 4], size=40, repeats=2, device="cpu", threads=1,
    )  # fmt: skip
    plain, clip = result["rewards"]
    assert plain["gflop_per_image"] == 0 and clip["gflop_per_image"] > 0
    for reward in result["rewards"]:
        assert [b["batch_size"] for b in reward["batches"]] == [1, 4]
        for row in reward["batches"]:
            rate, seconds = row["images_per_second"], row["seconds"]
            assert rate["min"] <= rate["median"] <= rate["max"]
            assert rate["max"] == pytest.approx(row["batch_size"] / seconds["min"])
            assert row["peak_bytes"] > 1e6
    for row in clip["batches"]:
        # One prompt a call: its encoding counts once, however many pictures share it.
        gflop = clip["gflop_per_image"] + clip["gflop_per_call"] / row["batch_size"]
        expected = row["images_per_second"]["median"] * gflop / 1e3
        assert row["tflops"] == pytest.approx(expected)
        assert row["share_of_matmul"] == pytest.approx(row["tflops"] / result["matmul"]["tflops"])
    text = rewards_summary(result)
    assert text.count("clip_score") == 2 and "matrix product" in text


def test_the_flops_are_the_towers(clip_folder: Path) -> None:
    """Two layers of width 32 on 17 tokens: products of the blocks, patches and projection."""
    (clip,) = bench_rewards([f"clip_score@{clip_folder}"], batch_sizes=[1], repeats=1, size=32,
                            device="cpu", threads=1)["rewards"]  # fmt: skip
    tokens, width, inner = 17, 32, 64
    block = 4 * tokens * width**2 + 2 * tokens * width * inner + 2 * tokens**2 * width
    vision = 2 * (2 * block + 16 * 3 * 64 * width + width * 24)
    assert clip["gflop_per_image"] * 1e9 == pytest.approx(vision, rel=0.02)
    assert clip["gflop_per_call"] > 0  # the text tower


def test_only_the_reward_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, to_pil = [], Media.to_pil

    def counted(media: Media) -> list[Any]:
        made.append(len(media))
        return to_pil(media)

    monkeypatch.setattr(Media, "to_pil", counted)
    bench_rewards(["contrast"], batch_sizes=[1, 4], size=16, repeats=2, device="cpu", threads=1)
    assert set(made) == {1}  # one picture as a fact, never the batch
    before = len(made)
    bench_rewards(["contrast"], batch_sizes=[1, 4], size=16, repeats=5, device="cpu", threads=1)
    assert len(made) == 2 * before


def test_what_scores_nothing_is_not_timed() -> None:
    def silent(images: Any, prompts: Any) -> list[None]:
        return [None] * len(images)

    with pytest.raises(
        ConfigError, match=r"'silent' does not score .* rate would be that of doing"
    ):
        bench_rewards([silent], batch_sizes=[1], size=16, repeats=1, device="cpu", threads=1)


def test_rewards_with_facts_are_given_them() -> None:
    seen: list[Any] = []

    class Edit:
        info = RewardInfo(name="edit", needs=("prompt", "source", "reference"))
        identity = "edit@1"

        def score(self, media: Media, prompts: Any, context: Any = None) -> Score:
            seen.extend(c["source"].size + c["reference"].size for c in context)
            return Score.of(torch.ones(len(media)))

    bench_rewards([Edit()], batch_sizes=[3], size=16, repeats=1, device="cpu", threads=1)
    assert set(seen) == {(16,) * 4}


def test_text_is_looked_for() -> None:
    pytest.importorskip("rapidocr")
    (ocr,) = bench_rewards(["ocr"], batch_sizes=[1], size=64, repeats=1, device="cpu",
                           threads=1)["rewards"]  # fmt: skip
    assert ocr["batches"][0]["seconds"]["median"] > 0.005


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    argv = ["bench", "--reward", "shapes_strict", "sharpness", "--batch-sizes", "1, 2"]
    argv += ["--size", "32", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    assert main(argv) == 0
    assert "images/s" in capsys.readouterr().out
    data = json.loads(out.read_text())
    assert [r["reward"] for r in data["rewards"]] == ["shapes_strict", "sharpness"]
    assert main(["bench"]) == 2
    assert "give --policy, or --reward" in capsys.readouterr().err
    assert main([*argv[:5], "x"]) == 2
    with pytest.raises(ConfigError, match="batch is 0"):
        bench_rewards(["sharpness"], batch_sizes=[0])
