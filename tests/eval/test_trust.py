"""Training data and rewards that bear on a result, repeated requests, strictness, swapping."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from eval.assembly import AHEAD, assembly_line
from eval.benchmarks.shapes import ShapesBenchmark
from eval.evaluation_page import evaluation_report
from eval.harness import GapError, run_benchmark
from eval.result import EvalResult, ResultError
from eval.trust import cautions
from mmalign.runtime.log import read_jsonl
from mmalign.runtime.training_record import TrainingRecord, prompt_hash, reward_names


@pytest.fixture(scope="module")
def benchmark() -> ShapesBenchmark:
    return ShapesBenchmark(prompts_per_task=2, samples_per_prompt=2)


@pytest.fixture
def run(studio, benchmark, tmp_path):
    """Run into ``tmp_path / "out"``, quietly."""

    def go(sketch=None, **options):
        sketch = sketch or studio.Sketch(skill=0.6)
        options = {"batch_size": 5, "progress": False, "generate": sketch, **options}
        out = options.pop("out", tmp_path / "out")
        return run_benchmark(studio.Painter(), benchmark, out, **options)

    return go


@pytest.mark.parametrize(
    "other",
    ["A photo of a red  star.", " a PHOTO of a red star", "a photo of a\u00a0red star"],
)
def test_prompts_are_recognised_in_other_spelling(other):
    assert prompt_hash(other) == prompt_hash("a photo of a red star")
    assert prompt_hash("a photo of a blue star") != prompt_hash("a photo of a red star")


def test_names_of_rewards():
    assert reward_names("1*shapes_partial + 0.1*sharpness@8c0f") == ("shapes_partial", "sharpness")
    assert reward_names("shapes_clip@abca48-579687") == ("shapes_clip",)


def test_record_lies_with_the_model(tmp_path):
    record = TrainingRecord.of(["a star", "A star", "a circle"], "shapes_partial@1-ab")
    assert len(record.prompts) == 2
    record.write(tmp_path)
    (tmp_path / "lora").mkdir()
    weights = tmp_path / "lora" / "weights.safetensors"
    weights.write_bytes(b"")
    # Beside a file, in a folder, in the folder of the run above it.
    assert TrainingRecord.near(None, tmp_path / "lora") == record
    record.write(tmp_path / "lora")
    assert TrainingRecord.near(str(weights)) == record == TrainingRecord.near(tmp_path)
    assert TrainingRecord.near("shapes-flow", None) is None
    assert "a star" not in (tmp_path / "training.json").read_text()
    (tmp_path / "training.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match=r"no record of a training .*format 9"):
        TrainingRecord.near(tmp_path)


def test_contamination_and_the_training_reward_are_said(run, benchmark, tmp_path):
    requests = benchmark.requests()
    seen = {r.prompt.upper() for r in requests if r.task in ("counting", "colors")}
    record = TrainingRecord.of([*seen, "something else"], "1*shapes_strict + 1*sharpness@0a")
    found = run(training=record)
    facts = found.training
    assert (facts["seen"], facts["prompts"]) == (4, 12) and facts["training_prompts"] == 5
    assert facts["judged_by"] == ["shapes_strict"]  # sharpness does not judge here
    means = {t: s.accuracy.mean for t, s in found.tasks.items()}
    assert facts["accuracy_seen"] == pytest.approx((means["counting"] + means["colors"]) / 2)
    rest = [m for t, m in means.items() if t not in ("counting", "colors")]
    assert facts["accuracy_unseen"] == pytest.approx(sum(rest) / 4)
    said = " ".join(cautions(found))
    assert "own reward judges here (shapes_strict)" in said
    assert "4 of 12 prompts were trained on" in said
    page = evaluation_report(found, tmp_path / "page.html").read_text()
    assert "4 of 12 prompts were trained on" in page
    assert EvalResult.load(tmp_path / "out" / "result.json").training == facts
    assert run(out=None).training == {} and cautions(run(out=None)) == []


def test_a_limited_run_says_so(run):
    found = run(limit=6)
    assert found.limited and found.available == 24
    assert "Only 6 of the benchmark's 24 pictures." in cautions(found)
    assert not run().limited


def test_repeated_requests_are_named(run, benchmark, monkeypatch):
    first = benchmark.requests()
    monkeypatch.setattr(
        benchmark, "requests", lambda limit=None: [*first[:3], replace(first[0], key="again")]
    )
    found = run()
    assert len(found.problems) == 1 and "'again' ask for one picture" in found.problems[0]
    with pytest.raises(GapError, match="ask for one picture"):
        run(strict=True)


def test_strict_keeps_what_there_is(run, studio, tmp_path):
    with pytest.raises(GapError, match=r"of 24 pictures are unscored .*lies in"):
        run(studio.Sketch(skill=1.0, noisy=0.3), strict=True)
    assert len(EvalResult.load(tmp_path / "out" / "result.json").rows) == 24
    assert run(studio.Sketch(), out=None, strict=True).overall.unscored == 0


@pytest.mark.parametrize("place", ["result", "row"])
def test_unknown_columns_of_a_result_are_named(run, tmp_path, place):
    run(limit=2)
    path = tmp_path / "out" / "result.json"
    data = json.loads(path.read_text())
    (data if place == "result" else data["rows"][1])["valeu"] = 1
    path.write_text(json.dumps(data))
    with pytest.raises(ResultError, match="'valeu'. Did you mean 'value'" if place == "row"
                       else "column of result 'valeu'"):  # fmt: skip
        EvalResult.load(path)


# --- swapping -----------------------------------------------------------------------------------


def scores(result):
    """What must agree."""
    return [(r.key, r.value, r.valid, r.partial) for r in result.rows]


def test_swapping_judges_from_the_files(run, studio, benchmark, tmp_path, monkeypatch):
    order: list[str] = []

    class Logged(studio.Sketch):
        def __call__(self, *args, **options):
            order.append("make")
            return super().__call__(*args, **options)

    judge = benchmark.judge
    monkeypatch.setattr(
        benchmark, "judge", lambda media, rows: (order.append("judge"), judge(media, rows))[1]
    )
    whole = run(out=tmp_path / "whole")
    order.clear()
    swapped = run(Logged(skill=0.6), swap=True)
    assert scores(swapped) == scores(whole) and swapped.nfe == whole.nfe
    assert order == ["make"] * 5 + ["judge"] * 5
    with pytest.raises(ValueError, match="swap judges pictures from their files"):
        run(out=None, swap=True)


def test_a_swapped_run_continues_between_its_phases(run, studio, benchmark, tmp_path, monkeypatch):
    def refuse(media, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(benchmark, "judge", refuse)
        with pytest.raises(KeyboardInterrupt):
            run(swap=True)
    lines = read_jsonl(tmp_path / "out" / "samples.jsonl")
    assert len(lines) == 24 and not any(line["judged"] for line in lines)
    sketch = studio.Sketch(skill=0.6)
    found = run(sketch)  # without swapping too
    assert sketch.asked == [] and found.overall.unscored == 0 and found.nfe == 240
    assert scores(found) == scores(run(out=None))


def test_a_broken_picture_stays_broken_when_swapped(run, studio):
    import torch

    class Diverged(studio.Sketch):
        def _draw(self, prompt, seed):
            return torch.full((3, 64, 64), float("nan"))

    found = run(Diverged(), swap=True)
    assert found.overall.unscored == 24 and "NaN" in found.rows[0].note
    assert run(Diverged(), swap=True).rows == found.rows


# --- the assembly line --------------------------------------------------------------------------


def test_making_does_not_wait_for_judging():
    """The second batch is made while the first is judged, and no more than a few are under way."""
    from threading import Event

    second, under_way, most = Event(), 0, 0

    def make(item):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if item == 1:
            second.set()
        return item

    def judge(item, made):
        assert second.wait(20)  # would never end if making came after judging
        return made

    def keep(item, judged, seconds):
        nonlocal under_way
        under_way -= 1
        return item, seconds >= 0

    assert list(assembly_line(range(9), make, judge, keep)) == [(n, True) for n in range(9)]
    assert 2 <= most <= AHEAD + 2


def test_errors_come_after_what_was_made_before():
    kept = []

    def judge(item, made):
        if item == 2:
            raise ValueError("broken judge")
        return made

    with pytest.raises(ValueError, match="broken judge"):
        for _ in assembly_line(range(5), lambda i: i, judge, lambda i, j, s: kept.append(i)):
            pass
    assert kept[:2] == [0, 1] and 2 not in kept
