"""Benchmarks through the harness and real judges: detectors, a chat server, the shipped models."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch

from eval.benchmarks.dpg import DPGBench
from eval.benchmarks.geneval import GenEvalBenchmark
from eval.benchmarks.shapes_geneval import ShapesGenEval
from eval.benchmarks.unigenbench import UniGenBench
from eval.benchmarks.wise import Wise
from eval.harness import run_benchmark
from eval.layouts import layout_of
from eval.result import EvalResult
from mmalign.assets import asset, assets_root
from mmalign.cli import main
from mmalign.shapes import parse, render, sample_scene
from mmalign.types import Media
from trainers.pretrain.detector import build_detector, export

SERVER = {"backoff": 0.01, "retries": 1, "timeout": 5.0}


def judge(chat, name: str) -> dict:
    return {"reward": name, "url": chat.url, "model": "tiny", "server": SERVER}


def pictures(count: int) -> Media:
    return Media(torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def test_unigenbench_asks_about_every_test_point(tmp_path: Path, chat) -> None:
    rows = []
    for index, names in enumerate((["Style"], ["Style", "Action - Hand"])):
        record = {"Testpoints": names, "Testpoint Description": [f"about {n}" for n in names]}
        rows.append(f'{index},prompt {index},"{json.dumps(record)}"'.replace('"', '""'))
        rows[-1] = rows[-1].replace('""{', '"{', 1)[:-2] + '"'
    path = tmp_path / "test_prompts_en.csv"
    path.write_text("index,prompt_en,sub_dims_en\n" + "\n".join(rows) + "\n")

    def answer(c):
        names = re.findall(r'^- "(\w+)"', c.text, re.MULTILINE)
        met = {n: int("Style" in c.text.split(f'"{n}"')[1].split("\n")[0]) for n in names}
        return json.dumps({n: {"reason": "seen", "score": met[n]} for n in names})

    chat.respond = answer
    benchmark = UniGenBench(path, reward=judge(chat, "rubric_judge"), samples_per_prompt=1)
    score = benchmark.judge(pictures(2), benchmark.requests())
    assert score.value.tolist() == [1.0, 0.5] and score.valid.all()
    assert score.parts["point_0"].tolist() == [1.0, 1.0]
    assert score.parts["point_1"].isnan().tolist() == [True, False]
    assert any("Action - Hand: about Action - Hand" in c.text for c in chat.seen)


def test_wise_value_is_the_wiscore_and_the_judge_reads_the_explanation(
    tmp_path: Path, chat
) -> None:
    record = {"Prompt": "a gift", "Explanation": "it is a carnation", "prompt_id": 7}
    (tmp_path / "cultural_common_sense.json").write_text(json.dumps([record]))
    given = {"consistency": 2, "realism": 1, "aesthetics": 0}
    chat.respond = lambda c: json.dumps(
        {n: {"reason": "seen", "score": s} for n, s in given.items()}
    )
    benchmark = Wise(tmp_path, reward=judge(chat, "rubric_judge"))
    score = benchmark.judge(pictures(1), benchmark.requests())
    assert score.value.tolist() == pytest.approx([(0.7 * 2 + 0.2 * 1) / 2])
    assert "it is a carnation" in chat.seen[0].text
    chat.respond = lambda c: json.dumps({"correct": {"reason": "seen", "score": 1}})
    benchmark = Wise(tmp_path, variant="verified", reward=judge(chat, "rubric_judge"))
    assert benchmark.judge(pictures(1), benchmark.requests()).value.tolist() == [1.0]
    with pytest.raises(ValueError, match="gives no part 'consistency'"):
        Wise(tmp_path, reward="sharpness").judge(pictures(1), benchmark.requests())


def test_dpg_through_the_harness_with_the_shipped_language_model(
    tmp_path: Path, studio, capsys
) -> None:
    data = tmp_path / "dpg_bench.csv"
    data.write_text(
        "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
        "a,a photo of a red star,1,0,entity - whole (star),a photo of a star\n"
        "a,a photo of a red star,2,1,attribute - color (star; red),a photo of a red star\n"
        "b,broken,1,5,entity - whole (cup),a cup\n"
    )
    reward = {"reward": "yes_no_judge", "checkpoint": str(asset("shapes-vlm"))}
    benchmark = DPGBench(data, mode="fixed", reward=reward, samples_per_prompt=2, device="cpu")
    result = run_benchmark(
        studio.Painter(), benchmark, tmp_path / "out", generate=studio.Sketch(), progress=False
    )
    row = result.rows[0]
    assert row.valid and row.parts.keys() == {"q1", "q2"}
    cut = [(r.parts["q1"] + r.parts["q1"] * r.parts["q2"]) / 2 for r in result.rows]
    assert [r.value for r in result.rows] == cut
    assert result.numbers["DPG-Bench"] == pytest.approx(100 * sum(cut) / 2)
    assert {"entity", "attribute"} <= result.numbers.keys()
    assert "question 1 depends on 5" in result.problems[0]
    again = EvalResult.load(tmp_path / "out" / "result.json")
    assert again.numbers == result.numbers and again.rows == result.rows


def _official_lines(prompts: list[str]) -> str:
    """What GenEval's metadata would say of prompts of the shapes world."""
    lines = []
    for prompt in prompts:
        spec = parse(prompt)
        include = [{"class": o.shape, "count": o.count, **({"color": o.color} if o.color else {})}
                   for o in spec.objects]  # fmt: skip
        exclude = [{"class": c["class"], "count": c["count"] + 1} for c in include]
        exclude = exclude if spec.task == "counting" else []
        record = {"tag": spec.task, "prompt": prompt, "include": include, "exclude": exclude}
        lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random detector of the shapes world's classes, which finds what is not there."""
    return export(build_detector(3), tmp_path_factory.mktemp("yolos") / "detector")


def test_geneval_command_on_official_files(tmp_path: Path, untrained: Path, capsys) -> None:
    """Files, options, detector, rules, aggregation, JSON, all through the command."""
    data = tmp_path / "evaluation_metadata.jsonl"
    data.write_text(_official_lines(["a photo of a star", "a photo of a red circle"]))
    reward = f"{{reward: geneval, checkpoint: {untrained}, colors: {asset('shapes-clip')}}}"
    command = ["evaluate", "--policy", "shapes-flow", "--benchmark", "geneval", "--data", str(data),
               "-o", f"reward={reward}", "--samples-per-prompt", "2", "--steps", "1",
               "--no-report", "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    assert "correct prompts" in capsys.readouterr().out
    result = EvalResult.load(tmp_path / "out" / "result.json")
    assert [r.task for r in result.rows] == ["single_object"] * 2 + ["colors"] * 2
    assert all(r.valid and r.value in (0.0, 1.0) for r in result.rows)
    values = [r.value for r in result.rows]
    assert result.numbers["overall"] == sum(values) / 4
    assert result.settings["options"]["mode"] == "compat"
    assert "geneval-official" in result.settings["scorer"]


def test_shapes_geneval_runs_with_any_detector(untrained: Path) -> None:
    benchmark = ShapesGenEval(prompts_per_task=1, samples_per_prompt=1, detector=untrained)
    requests = benchmark.requests()
    rng = random.Random(0)
    shown = Media.from_pil([render(sample_scene(parse(r.prompt), rng)) for r in requests])
    score = benchmark.judge(shown, requests)
    assert score.parts["exact"].tolist() == [1.0] * len(requests)  # the verifier has no doubt
    assert score.valid.all() and set(score.value.tolist()) <= {0.0, 1.0}
    assert "geneval-strict" in score.identity and "shapes" in score.identity


def test_a_reward_that_is_no_geneval_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "evaluation_metadata.jsonl"
    data.write_text(_official_lines(["a photo of a star"]))
    benchmark = GenEvalBenchmark(data, reward="jpeg_compressibility", samples_per_prompt=1)
    with pytest.raises(ValueError, match="no part 'official'"):
        benchmark.judge(pictures(1), benchmark.requests())


def test_geneval_writes_and_reads_the_official_folders(tmp_path: Path) -> None:
    data = tmp_path / "evaluation_metadata.jsonl"
    data.write_text(_official_lines(["a photo of a star", "a photo of two circles"]))
    benchmark = GenEvalBenchmark(data, samples_per_prompt=2)
    requests = benchmark.requests()
    stored = {}
    for request, image in zip(requests, pictures(4).to_pil(), strict=True):
        stored[request.key] = tmp_path / f"{request.key}.png"
        image.save(stored[request.key])
    layout = layout_of(benchmark.layout)
    layout.write(tmp_path / "official", requests, stored)
    assert (tmp_path / "official" / "00001" / "samples").is_dir()
    record = json.loads((tmp_path / "official" / "00001" / "metadata.jsonl").read_text())
    assert record["tag"] == "counting" and record["prompt"] == "a photo of two circles"
    found = layout.read(tmp_path / "official", requests)
    assert found.cells.keys() == stored.keys() and not found.problems


# --- the whole GenEval path in the shapes world --------------------------------------------------

needs_detector = pytest.mark.skipif(
    not (assets_root() / "shapes-detector").is_dir(), reason="assets/shapes-detector is not there"
)


def test_shapes_geneval_asks_only_what_geneval_has_words_for(tmp_path: Path) -> None:
    benchmark = ShapesGenEval(prompts_per_task=6, samples_per_prompt=1)
    prompts = {r.prompt for r in benchmark.requests()}
    assert prompts and not any("cyan" in p for p in prompts)
    assert {r.task for r in benchmark.requests()} == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr"}  # fmt: skip


@needs_detector
def test_rendered_scenes_pass_and_others_fail() -> None:
    benchmark = ShapesGenEval(prompts_per_task=8, samples_per_prompt=1)
    requests = benchmark.requests()
    rng = random.Random(0)
    right = [render(sample_scene(parse(r.prompt), rng)) for r in requests]
    score = benchmark.judge(Media.from_pil(right), requests)
    assert score.parts["exact"].mean() == 1.0 and score.valid.all()
    # GenEval asks a distance between centres that close neighbours do not keep.
    placed = torch.tensor([r.task == "position" for r in requests])
    assert score.value[~placed].mean() > 0.94 and score.value[placed].mean() > 0.4
    wrong = right[1:] + right[:1]
    score = benchmark.judge(Media.from_pil(wrong), requests)
    agree = (score.value == score.parts["exact"])[score.valid]
    assert agree.float().mean() > 0.9


@needs_detector
def test_the_generator_goes_through_the_geneval_path(tmp_path: Path, capsys) -> None:
    command = ["evaluate", "--policy", "shapes-flow", "--benchmark", "shapes_geneval", "--limit",
               "12", "--steps", "8", "--out", str(tmp_path), "--no-report",
               "--device", "cpu"]  # fmt: skip
    assert main(command) == 0
    assert "agreement with the verifier" in capsys.readouterr().out
    result = EvalResult.load(tmp_path / "result.json")
    assert 0.0 <= result.numbers["agreement with the verifier"] <= 1.0
    assert all(r.parts.keys() >= {"official", "strict", "exact"} for r in result.rows if r.valid)
