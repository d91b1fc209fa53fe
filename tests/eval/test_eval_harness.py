"""The harness: resume picture by picture, never mix runs, and the same result in any batch size."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from eval.benchmarks.shapes import ShapesBenchmark
from eval.harness import SettingsMismatchError, run_benchmark
from eval.result import EvalResult
from mmalign.protocols import Request
from mmalign.types import Media


@pytest.fixture(scope="module")
def benchmark() -> ShapesBenchmark:
    return ShapesBenchmark(prompts_per_task=4, samples_per_prompt=1)


@pytest.fixture
def run(studio, benchmark, tmp_path):
    """Run into ``tmp_path / "out"`` with quiet defaults; returns the result and what was asked."""

    def go(sketch=None, policy=None, out=tmp_path / "out", **options):
        sketch = sketch or studio.Sketch(skill=0.6)
        options = {"batch_size": 5, "progress": False, "generate": sketch, **options}
        return run_benchmark(policy or studio.Painter(), benchmark, out, **options), sketch.asked

    return go


def _scores(result):
    return [(r.key, r.value, r.valid, r.partial) for r in result.rows]


def test_result_holds_every_request_in_order(run, benchmark):
    result, asked = run(label="before")
    assert [r.key for r in result.rows] == [r.key for r in benchmark.requests()]
    assert len(asked) == 24 and result.nfe == 240
    assert result.label == "before" and result.policy == "painter"
    assert result.settings["steps"] == 10 and result.settings["guidance_scale"] == 3.0
    assert result.seconds > 0 and result.images_per_second > 0
    expected = sum(t.accuracy.mean for t in result.tasks.values()) / 6
    assert result.accuracy.mean == pytest.approx(expected)
    assert {"torch", "diffusers", "python"} <= result.provenance["versions"].keys()
    assert "shapes_strict" in result.provenance["scorer"] and result.provenance["device"]


def test_perfect_painter_scores_one(run, studio):
    result, _ = run(studio.Sketch(skill=1.0))
    assert result.accuracy.mean == 1.0 and result.accuracy.low < 1.0


def test_file_round_trip(run, tmp_path):
    result, _ = run()
    loaded = EvalResult.load(tmp_path / "out" / "result.json")
    assert loaded == result and loaded.folder == result.folder
    assert all(loaded.image_path(r) is not None for r in loaded.rows)
    json.loads((tmp_path / "out" / "result.json").read_text(), parse_constant=pytest.fail)
    with pytest.raises(ValueError, match="format"):
        EvalResult.from_json("{}")


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batch_size_changes_nothing(run, tmp_path, batch_size):
    whole, _ = run(out=tmp_path / "one", batch_size=24)
    parts, _ = run(out=tmp_path / "two", batch_size=batch_size)
    assert _scores(whole) == _scores(parts)
    for row in whole.rows:
        assert whole.image_path(row).read_bytes() == parts.image_path(row).read_bytes()


def test_finished_run_is_not_repeated(run):
    first, _ = run()
    second, asked = run()
    assert asked == [] and _scores(first) == _scores(second)
    assert second.nfe == first.nfe and second.seconds == pytest.approx(first.seconds)


def test_only_lost_and_damaged_pictures_are_made_again(run, tmp_path):
    first, _ = run()
    lost = first.rows[::2]
    for row in lost:
        first.image_path(row).unlink()
    damaged = first.image_path(first.rows[1])
    damaged.write_bytes(damaged.read_bytes()[:-40])
    second, asked = run()
    wanted = {(r.prompt, r.seed) for r in (*lost, first.rows[1])}
    assert set(asked) == wanted and len(asked) == 13
    assert _scores(second) == _scores(first) and second.nfe == first.nfe


def test_killed_run_continues_to_the_same_result(run, studio, tmp_path):
    clean, _ = run(out=tmp_path / "clean")

    class Killed(studio.Sketch):
        def __call__(self, *args, **options):
            if len(self.asked) >= 10:
                raise KeyboardInterrupt
            return super().__call__(*args, **options)

    with pytest.raises(KeyboardInterrupt):
        run(Killed(skill=0.6))
    lines = tmp_path / "out" / "samples.jsonl"
    assert len(lines.read_text().splitlines()) == 10
    with lines.open("a") as file:
        file.write('{"key": "single_obj')  # the kill came in the middle of a line
    result, asked = run()
    assert len(asked) == 14 and _scores(result) == _scores(clean)
    assert len(lines.read_text().splitlines()) == 24


def test_larger_limit_continues_a_smaller_one(run):
    run(limit=6)
    result, asked = run()
    assert len(asked) == 18 and len(result.rows) == 24


@pytest.mark.parametrize(
    ("options", "said"),
    [({"steps": 11}, "steps: 10 there, 11 now"), ({"guidance_scale": 1.0}, "guidance_scale")],
)
def test_other_settings_in_the_same_folder_are_an_error(run, options, said):
    run()
    with pytest.raises(SettingsMismatchError, match=said):
        run(**options)


def test_other_weights_in_the_same_folder_are_an_error(run, studio):
    run()
    with pytest.raises(SettingsMismatchError, match="denoiser"):
        run(policy=studio.Painter(weight=1.0001))


def test_changed_prompts_under_an_old_key_are_an_error(run, benchmark, monkeypatch):
    run()
    changed = [Request(**{**r.__dict__, "seed": 1}) for r in benchmark.requests()]
    monkeypatch.setattr(benchmark, "requests", lambda limit=None: changed)
    with pytest.raises(SettingsMismatchError, match="with seed 1 is asked for"):
        run()


def test_unscored_pictures_are_counted_both_ways(run, studio):
    result, _ = run(studio.Sketch(skill=1.0, noisy=0.3))
    failed = [r for r in result.rows if not r.valid]
    assert 0 < len(failed) == result.overall.unscored
    assert all(r.value is None and r.partial is None and r.note for r in failed)
    assert result.accuracy.mean == pytest.approx(1.0)
    share = result.accuracy_counting_unscored_as_wrong.mean
    assert share == pytest.approx(1 - len(failed) / len(result.rows))


def test_broken_pictures_are_unscored_not_black(run, studio):
    class Diverged(studio.Sketch):
        def _draw(self, prompt, seed):
            return torch.full((3, 64, 64), math.nan)

    result, _ = run(Diverged())
    assert result.overall.unscored == 24 and "NaN" in result.rows[0].note
    assert math.isnan(result.accuracy.mean)
    assert result.accuracy_counting_unscored_as_wrong.mean == 0.0


def test_without_a_folder_and_without_pictures(run, tmp_path):
    kept, _ = run()
    memory, _ = run(out=None)
    bare, _ = run(out=tmp_path / "bare", save_images=False)
    assert _scores(memory) == _scores(bare) == _scores(kept)
    assert memory.rows[0].image is None and not (tmp_path / "bare" / "images").exists()
    again, asked = run(out=tmp_path / "bare", save_images=False)
    assert asked == [] and _scores(again) == _scores(kept)
    _, asked = run(out=tmp_path / "bare")  # pictures are wanted now, so they are made
    assert len(asked) == 24


def test_results_move_with_their_folder(run, tmp_path):
    run()
    shutil.move(tmp_path / "out", tmp_path / "moved")
    loaded = EvalResult.load(tmp_path / "moved" / "result.json")
    assert loaded.image_path(loaded.rows[0]) is not None


@pytest.mark.parametrize("key", ["../escape", "a/b", "", ".hidden"])
def test_keys_that_are_no_file_names_are_refused(run, benchmark, monkeypatch, key):
    request = Request(key=key, prompt="a photo of a star", task="t", sample=0, seed=0)
    monkeypatch.setattr(benchmark, "requests", lambda limit=None: [request])
    with pytest.raises(ValueError, match="cannot be a file name"):
        run()


def test_bad_calls_are_explained(run, studio):
    class Short(studio.Sketch):
        def __call__(self, *args, **options):
            media, nfe = super().__call__(*args, **options)
            return Media(media.data[:-1]), nfe

    with pytest.raises(ValueError, match="batch_size"):
        run(batch_size=0)
    with pytest.raises(ValueError, match="asked for 5 pictures, generated 4"):
        run(Short())


def test_progress_is_a_line_on_a_log(run, capsys):
    run(progress=True, label="before")
    said = capsys.readouterr().err
    assert "shapes before: 24/24" in said and "left" in said
