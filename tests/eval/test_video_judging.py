"""Videos from their files through shipped rewards and judges to the numbers of a benchmark."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chat_server import serving
from PIL import Image

from eval.reward_benchmarks.answer_files import VideoRewardBench
from eval.reward_benchmarks.run import UnfitError, evaluate_rewards
from eval.reward_benchmarks.scoring import Settings
from eval.reward_benchmarks.videogen import VideoGenRewardBench
from eval.reward_benchmarks.videoscore import VideoScoreBench
from mmalign.assets import asset
from mmalign.cli import main
from mmalign.shapes import parse, render, sample_scene

PROMPT = "a photo of a red star"
OTHER = "a photo of a blue square"


def clip(prompt: str, seed: int, count: int = 3) -> list[Image.Image]:
    """A scene that drifts to the right."""
    scene = sample_scene(parse(prompt), random.Random(seed))
    shots = [
        replace(scene, objects=tuple(replace(o, x=o.x + 0.02 * k) for o in scene.objects))
        for k in range(count)
    ]
    return [render(shot) for shot in shots]


def write(path: Path, shots: list[Image.Image]) -> Path:
    """An animation, a folder of frames, or (with PyAV) a video file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mp4":
        av = pytest.importorskip("av", reason="needs the extra 'video'")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height = shots[0].size
            stream.bit_rate = 4_000_000
            for shot in shots:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(shot))))
            container.mux(stream.encode())
    elif path.suffix:
        shots[0].save(path, save_all=True, append_images=shots[1:], duration=125)
    else:
        path.mkdir()
        for k, shot in enumerate(shots):
            shot.save(path / f"{k}.png")
    return path


def videogen(folder: Path, suffix: str) -> Path:
    """Two pairs: the right video is A in the first, B in the second."""
    right, wrong = f"videos/right{suffix}", f"videos/wrong{suffix}"
    write(folder / right, clip(PROMPT, 0)), write(folder / wrong, clip(OTHER, 1))
    labels = {"A_model": "x", "B_model": "y", "prompt": PROMPT}
    rows = [
        {"path_A": a, "path_B": b, **labels, **dict.fromkeys(("VQ", "MQ"), "same"),
         **dict.fromkeys(("TA", "Overall"), label)}
        for a, b, label in ((right, wrong, "A"), (wrong, right, "B"))
    ]  # fmt: skip
    with (folder / "videogen-rewardbench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.mark.parametrize("suffix", ["", ".png", ".mp4"])
def test_a_shipped_reward_on_frames_of_a_file(tmp_path: Path, suffix: str, capsys) -> None:
    spec = "{compose: frames, parts: [shapes_clip], label: frames}"
    code = main(["evaluate-reward", "--benchmark", "videogen_reward_bench", "--data",
                 str(videogen(tmp_path, suffix)), "--reward", spec, "sharpness", "--out",
                 str(tmp_path / "out"), "--frames", "3", "--quiet"])  # fmt: skip
    assert code == 0 and "frames" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    rows = {row["label"]: row["measures"] for row in result["rows"]}
    assert rows["frames"]["Overall without ties"]["mean"] == 1.0
    assert rows["frames"]["TA without ties"]["mean"] == 1.0
    assert result["provenance"]["frames"] == 3 and "sharpness" in rows


def test_a_shipped_judge_on_frames_of_a_file(tmp_path: Path) -> None:
    judge = {"reward": "yes_no_judge", "checkpoint": str(asset("shapes-vlm"))}
    spec = {"compose": "frames", "parts": {"judge": judge}, "frames": 2}
    benchmark = VideoGenRewardBench(videogen(tmp_path, ".png"))
    report = evaluate_rewards(benchmark, {"judge": spec}, settings=Settings(frames=3))
    assert report["judge"].measures["Overall without ties"].mean == 1.0
    assert report["judge"].unscored == 0


def test_rewards_of_pictures_are_refused_with_the_way_to_use_them(tmp_path: Path) -> None:
    benchmark = VideoGenRewardBench(videogen(tmp_path, ".png"))
    with pytest.raises(UnfitError, match=r"takes image, but .* holds videos; ask about its frames"):
        evaluate_rewards(benchmark, ["shapes_clip"])


def test_the_video_judge_rates_in_the_benchmarks_dimensions(tmp_path: Path) -> None:
    """Ratings 4, 2, 5: the judge says 4, 3, 5, so two of three are exact and all within 1."""
    write(tmp_path / "videos" / "v1.gif", clip(PROMPT, 0))
    row = {"video_name": "v1", "t2v_prompt": PROMPT, "v_score_gt": 4, "t_score_gt": 2,
           "p_score_gt": 5}  # fmt: skip
    (tmp_path / "bench.jsonl").write_text(json.dumps(row) + "\n")
    said = {"visual_quality": 4, "motion_quality": 1, "text_alignment": 3,
            "physical_consistency": 5}  # fmt: skip
    with serving() as chat:
        chat.respond = lambda c: json.dumps(
            {n: {"reason": "seen", "score": s} for n, s in said.items()}
        )
        spec = {"reward": "video_judge", "url": chat.url, "server": {"retries": 0}}
        report = evaluate_rewards(VideoScoreBench(tmp_path), {"judge": spec})
        assert [len(c.images) for c in chat.seen] == [3]  # one question, all frames
    measures = report["judge"].measures
    assert measures["accuracy"].mean == pytest.approx(2 / 3)
    assert measures["accuracy within 1"].mean == 1.0
    assert measures["accuracy, text alignment"].mean == 0.0


def test_answers_about_a_video_are_judged_by_its_frames(tmp_path: Path) -> None:
    write(tmp_path / "v.webp", clip(PROMPT, 0, 5))
    row = {"question": "What moves?", "chosen": "a red star", "rejected": "a dog",
           "video": "v.webp", "category": "perception"}  # fmt: skip
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")

    def answer(chat) -> str:
        star_first = chat.text.find("a red star") < chat.text.find("a dog")
        return json.dumps({"reason": "seen", "winner": "A" if star_first else "B"})

    with serving() as chat:
        chat.respond = answer
        spec = {"reward": "pairwise_judge", "url": chat.url, "server": {"retries": 0}}
        report = evaluate_rewards(VideoRewardBench(tmp_path / "x.jsonl"), {"judge": spec},
                                  settings=Settings(frames=4))  # fmt: skip
        assert [len(c.images) for c in chat.seen] == [4, 4]
    assert report["judge"].headline.mean == 1.0


def test_a_broken_video_is_named_and_the_rest_is_judged(tmp_path: Path) -> None:
    folder = videogen(tmp_path, ".png")
    path = folder / "videogen-rewardbench.csv"
    (folder / "videos" / "torn.png").write_bytes(b"\x89PNG torn")
    last = path.read_text().splitlines()[-1].replace("videos/wrong.png", "videos/torn.png")
    path.write_text(path.read_text() + last + "\n")
    spec = {"compose": "frames", "parts": ["shapes_clip"]}
    report = evaluate_rewards(VideoGenRewardBench(folder), {"r": spec})
    assert report["r"].items == 12 and report["r"].unscored == 4
    assert "torn.png" in next(iter(report["r"].reasons))
    assert report["r"].measures["Overall without ties"].mean == 1.0
