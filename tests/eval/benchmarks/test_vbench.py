"""Videos through the harness: generated, kept, judged, exported, read again; VBench's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.benchmarks.shapes import ShapesBenchmark
from eval.benchmarks.vbench import RANGES, VBench, flickering, totals
from eval.clips import read_clip
from eval.harness import judge_folder, run_benchmark
from eval.layouts import LayoutError
from mmalign.cli import main
from mmalign.policies.load import load_policy
from mmalign.registry import UnknownNameError
from mmalign.types import Media

ENTRIES = [
    {"prompt_en": "a red star", "dimension": ["color"]},
    {"prompt_en": "a calm lake", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red star", "dimension": ["scene", "color"]},
    {"prompt_en": "", "dimension": ["scene"]},
    {"prompt_en": "a dog", "dimension": ["colour"]},
]


def table(folder: Path) -> Path:
    path = folder / "VBench_full_info.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def run(folder: Path, *more: str) -> int:
    return main(["evaluate", "--benchmark", "vbench", "--data", str(folder), "--quiet",
                 "-o", "reward={compose: frames, parts: [contrast]}", *more])  # fmt: skip


def test_a_generator_of_videos_from_the_command_to_the_page(tmp_path: Path, capsys) -> None:
    out, path = tmp_path / "out", table(tmp_path)
    asked = ["--policy", "tiny-wan", "--steps", "2", "--samples-per-prompt", "1"]
    assert run(path, *asked, "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "reward on color" in said and "dimension 'colour' is none of" in said
    result = json.loads((out / "result.json").read_text())
    assert [r["key"] for r in result["rows"]] == ["0000-0", "0001-0"]
    assert all(r["valid"] for r in result["rows"])
    clips = [read_clip(out / "images" / f"{k}.png") for k in ("0000-0", "0001-0")]
    assert [c.size for c in clips] == [(32, 32, 5)] * 2
    numbers = result["numbers"]
    assert numbers["reward on color"] == numbers["reward on scene"] == result["rows"][0]["value"]
    # What was kept is what was judged: flicker of the kept frames is the part of the row.
    kept = torch.stack([Media.from_pil(clips[1].frames).data])
    flicker = numbers["temporal_flickering, without the static filter"]
    assert flicker == pytest.approx(float(flickering(kept)), abs=1e-6) and 0.5 < flicker < 1
    assert (out / "report.html").stat().st_size > 10_000
    before = (out / "samples.jsonl").read_text()
    assert run(path, *asked, "--out", str(out)) == 0  # goes on: nothing is made again
    assert (out / "samples.jsonl").read_text() == before
    # Kept clips in the official names, with the suffix that needs no encoder.
    folder = tmp_path / "videos"
    folder.mkdir()
    for key, prompt in (("0000-0", "a red star"), ("0001-0", "a calm lake")):
        (folder / f"{prompt}-0.png").write_bytes((out / "images" / f"{key}.png").read_bytes())
    reward = {"compose": "frames", "parts": ["contrast"]}
    again = judge_folder(folder, VBench(path, reward=reward, samples_per_prompt=1), progress=False)
    assert [r.value for r in again.rows] == [r["value"] for r in result["rows"]]


def test_judging_after_generating_reads_the_kept_clips(tmp_path: Path) -> None:
    """Two phases give the values of one: what is read back is what was made."""
    benchmark = VBench(table(tmp_path), reward="contrast", samples_per_prompt=1)
    values = []
    for swap in (False, True):
        result = run_benchmark(load_policy("tiny-wan"), benchmark, tmp_path / f"{swap}", steps=1,
                               swap=swap, progress=False)  # fmt: skip
        values.append([row.value for row in result.rows])
        assert all(row.valid for row in result.rows)
    assert values[0] == values[1] and len(set(values[0])) == 2


def test_video_files_are_written_and_read(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="needs the extra 'video'")
    path, out = table(tmp_path), tmp_path / "out"
    assert run(path, "--policy", "tiny-wan", "--steps", "1", "--samples-per-prompt", "1",
               "--out", str(out), "--export", str(tmp_path / "mp4")) == 0  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "mp4").iterdir()) == [
        "a calm lake-0.mp4", "a red star-0.mp4"]  # fmt: skip
    reward = {"compose": "frames", "parts": ["contrast"]}
    benchmark = VBench(path, reward=reward, samples_per_prompt=1)
    result = judge_folder(tmp_path / "mp4", benchmark, progress=False)
    made = json.loads((out / "result.json").read_text())["rows"]
    assert len(read_clip(tmp_path / "mp4" / "a red star-0.mp4").frames) == 5
    assert [r.value for r in result.rows] == pytest.approx([r["value"] for r in made], abs=0.03)


def test_kinds_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    wan = load_policy("tiny-wan")
    with pytest.raises(ValueError, match="shapes judges images, but tiny-wan makes videos"):
        run_benchmark(wan, ShapesBenchmark(prompts_per_task=1), progress=False)
    path = table(tmp_path)
    reward = {"compose": "frames", "parts": ["contrast"]}
    with pytest.raises(ValueError, match="vbench judges videos, but shapes-flow makes images"):
        run_benchmark(load_policy("shapes-flow"), VBench(path, reward=reward), progress=False)
    with pytest.raises(ValueError, match="'shapes_clip' takes pictures; ask it about the frames"):
        run_benchmark(wan, VBench(path, reward="shapes_clip"), progress=False)
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers" / "x-0.png").write_bytes(b"torn")
    with pytest.raises(LayoutError, match="holds not one of the 10"):
        judge_folder(tmp_path / "strangers", VBench(path, reward=reward), progress=False)


def test_prompts_are_merged_and_problems_named(tmp_path: Path) -> None:
    loaded = VBench(table(tmp_path), reward="contrast").load()
    assert [(p.text, p.facts["dimensions"]) for p in loaded.prompts] == [
        ("a red star", ("color", "scene")), ("a calm lake", ("temporal_flickering",))]  # fmt: skip
    assert ["entry 3" in loaded.problems[0], "entry 4" in loaded.problems[1]] == [True, True]
    only = VBench(table(tmp_path), reward="contrast", dimensions=["scene"])
    assert [p.task for p in only.load().prompts] == ["scene"]
    with pytest.raises(UnknownNameError, match=r"dimension of vbench 'colour'.*'color'"):
        VBench(table(tmp_path), dimensions=["colour"])


def test_flickering_by_hand() -> None:
    """Steps of 10 and 20 grey levels: the mean change is 15, so (255 - 15) / 255."""
    levels = torch.tensor([[100, 110, 90], [50, 50, 50]]) / 255
    videos = levels[:, :, None, None, None].expand(-1, -1, 3, 4, 4)
    assert flickering(videos).tolist() == pytest.approx([240 / 255, 1.0])
    assert flickering(videos[:, :1]).isnan().all()


def test_totals_by_hand() -> None:
    """All in the middle of their ranges but one: the dynamic degree, of weight one half, at 1."""
    scores = {d: (a + b) / 2 for d, (a, b) in RANGES.items()} | {"dynamic_degree": 1.0}
    found = totals(scores)
    assert found["quality"] == pytest.approx((6 * 0.5 + 0.5 * 1.0) / 6.5)
    assert found["semantic"] == pytest.approx(0.5)
    assert found["total"] == pytest.approx((4 * 3.5 / 6.5 + 0.5) / 5)
    assert totals({"scene": 0.9}) == {}  # never a total of what is not there
    beyond = totals({d: RANGES[d][1] for d in RANGES} | {"scene": 2 * 0.8222})
    assert beyond["semantic"] == pytest.approx(10 / 9)  # outside of its range, not clipped


def test_official_vbench_file(official) -> None:
    loaded = VBench(official("vbench"), reward="contrast").load()
    assert len(loaded.prompts) == 944 and not loaded.problems
    assert sum("color" in p.facts["dimensions"] for p in loaded.prompts) == 85
