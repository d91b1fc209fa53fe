"""Reports: self-contained, escaped, honest wording, robust to missing pieces, shown right."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
from chromium import CHROMIUM, Chromium
from html_page import Page
from PIL import Image

from eval.benchmarks.shapes import ShapesBenchmark
from eval.charts import Line, line_chart, number, spaced, ticks
from eval.comparison import judge_pairs
from eval.gallery import Pairs, data_uri, fair_sample, prompt_diversity
from eval.harness import run_benchmark
from eval.html import Markup, duration, el, points
from eval.report import evaluation_report, training_report
from eval.result import EvalResult, summarise
from eval.run_folder import read_run

EVIL = "<script>alert('x')</script> & \"quotes\""


def _evaluate(studio, folder, skill, label, noisy=0.0, prompts=10):
    benchmark = ShapesBenchmark(prompts_per_task=prompts, samples_per_prompt=2)
    sketch = studio.Sketch(skill=skill, noisy=noisy)
    return run_benchmark(
        studio.Painter(skill), benchmark, folder, progress=False, label=label, generate=sketch
    )


def _log(folder, updates=60):
    rows = [
        {
            "step": i,
            "seconds": 2.0,
            "nfe": 100,
            "reward/mean": 0.4 + 0.005 * i,
            "reward/std": 0.2,
            "reward/valid": 1.0,
            "kl": 0.001 * i,
            "ratio/mean": 1.0 + 1e-6 * i,
            "ratio/max_deviation": 1e-4,
            "clip_fraction": 0.1,
            "grad_norm": 0.5 if i else float("nan"),
            "zero_spread": 0.0,
            "diversity": 0.3,
            "loss": -1e-4,
            "phase": "warm",
        }
        for i in range(updates)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="module")
def finished_run(studio, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    folder.mkdir()
    _evaluate(studio, folder / "eval" / "before", 0.4, "before", noisy=0.05)
    _evaluate(studio, folder / "eval" / "after", 0.8, "after", noisy=0.05)
    (folder / "config.yaml").write_text(f"recipe: demo\nnote: {EVIL}\n")
    run = {"recipe": "demo", "seconds": 4210.0, "nfe": 1_638_400, "images": 38_400,
           "versions": {"torch": "2.x"}, "notes": [EVIL]}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    _log(folder)
    return folder


@pytest.fixture
def run_dir(finished_run, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(finished_run, tmp_path / "run")


SECTIONS = (
    "Before and after, by task", "Reward during training", "Health of the updates",
    "Same prompts, same seeds", "Fixed", "Broken", "Signs of reward hacking",
    "Configuration and provenance",
)  # fmt: skip


def _assert_self_contained(text):
    page = Page(text)
    fetched = [a for a in page.attributes if a[1] in ("src", "href", "srcset", "action", "poster")]
    assert all(value.startswith("data:image/png;base64,") for _, _, value in fetched)
    assert "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"url\(|@import", text)
    assert "prefers-color-scheme" in text


def test_training_report_has_every_section_and_fetches_nothing(run_dir):
    path = training_report(run_dir)
    text = path.read_text()
    assert path == run_dir / "report.html"
    assert [s for s in SECTIONS if f"<h2>{s}</h2>" not in text] == []
    _assert_self_contained(text)
    assert text.count("<img ") >= 48 and "1 h 10 min" in text and "1.6 M" in text


def test_everything_from_outside_is_escaped(run_dir):
    result = EvalResult.load(run_dir / "eval" / "after" / "result.json")
    for name in ("before", "after"):
        path = run_dir / "eval" / name / "result.json"
        old = EvalResult.load(path)
        rows = tuple(replace(r, prompt=r.prompt + EVIL, note=EVIL) for r in old.rows)
        replace(old, rows=rows, policy=EVIL).save(path)
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 0, f"a{EVIL}": 1.0}))
    pages = [training_report(run_dir)]
    rows = tuple(replace(r, prompt=EVIL, note=EVIL) for r in result.rows)
    pages.append(evaluation_report(replace(result, rows=rows, label=EVIL), run_dir / "e.html"))
    for path in pages:
        text = path.read_text()
        assert "<script" not in text and "&lt;script&gt;" in text
        _assert_self_contained(text)


def test_evaluation_report(run_dir):
    result = EvalResult.load(run_dir / "eval" / "after" / "result.json")
    text = evaluation_report(result, run_dir / "evaluation.html").read_text()
    _assert_self_contained(text)
    for title in ("By task", "A fair sample", "Best", "Worst", "Not scored", "Settings"):
        assert f"<h2>{title}</h2>" in text
    assert f"Accuracy {100 * result.accuracy.mean:.1f} %, 95 % interval [" in text


def _pairs(studio, before, after, **options):
    first = _evaluate(studio, None, before, "before", **options)
    return Pairs(first, _evaluate(studio, None, after, "after", **options))


def test_clear_gain_is_said_with_its_interval(studio):
    verdict = judge_pairs(_pairs(studio, 0.4, 0.8))
    assert verdict.tone == "gain"
    share, span = r"[\d.]+ %", r"95 % interval \[[\d.]+, [\d.]+\]"
    pattern = rf"Mean accuracy {share} → {share}, \+[\d.]+ points, {span}\."
    assert re.fullmatch(pattern, verdict.sentence)


def test_clear_loss_is_said_as_a_loss(studio):
    verdict = judge_pairs(_pairs(studio, 0.8, 0.4))
    assert verdict.tone == "loss" and re.search(r"−[\d.]+ points", verdict.sentence)


def test_no_change_claims_nothing(studio):
    verdict = judge_pairs(_pairs(studio, 0.5, 0.5))
    assert verdict.tone == "unclear" and verdict.sentence.startswith("No clear change")
    assert "which includes zero" in verdict.sentence and "0.0 points" in verdict.sentence


def test_a_few_changed_pictures_claim_nothing(studio):
    first = _evaluate(studio, None, 0.5, "before")
    wrong = [r for r in first.rows if r.value == 0.0][:4]
    rows = tuple(replace(r, value=1.0) if r in wrong else r for r in first.rows)
    tasks, overall = summarise(rows)
    verdict = judge_pairs(Pairs(first, replace(first, rows=rows, tasks=tasks, overall=overall)))
    assert verdict.tone == "unclear" and verdict.sentence.startswith("No clear change")


def test_too_few_pictures_give_no_verdict(studio):
    first, second = (_evaluate(studio, None, s, "", prompts=1) for s in (0.0, 1.0))
    one = lambda r: replace(r, rows=r.rows[:6])  # noqa: E731 - one picture of each task
    assert judge_pairs(Pairs(one(first), one(second))).tone == "unclear"
    assert "too few pictures" in judge_pairs(Pairs(one(first), one(second))).sentence


def test_unscored_pictures_and_other_settings_are_mentioned(studio):
    pairs = _pairs(studio, 0.4, 0.8, noisy=0.1)
    assert any("not scored both times" in d for d in judge_pairs(pairs).details)
    odd = replace(pairs.after, settings={**pairs.after.settings, "steps": 99})
    details = judge_pairs(Pairs(pairs.before, odd)).details
    assert any("settings differ (steps: 10 before, 99 after)" in d for d in details)


def test_evaluations_of_different_things_are_not_compared(studio, run_dir):
    first = _evaluate(studio, None, 0.4, "before")
    with pytest.raises(ValueError, match="version: '1' and '2'"):
        Pairs(first, replace(first, version="2"))
    with pytest.raises(ValueError, match="share no request"):
        Pairs(first, replace(first, rows=tuple(replace(r, seed=0) for r in first.rows)))
    path = run_dir / "eval" / "after" / "result.json"
    replace(EvalResult.load(path), version="2").save(path)
    assert "No verdict: before and after differ" in training_report(run_dir).read_text()


@pytest.mark.parametrize(
    "missing", ["eval", "eval/after", "eval/before", "metrics.jsonl", "config.yaml", "run.json"]
)
def test_missing_pieces_leave_a_readable_page(run_dir, missing):
    path = run_dir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = training_report(run_dir).read_text()
    _assert_self_contained(text)
    assert "<h1>" in text and 'class="verdict' in text
    if missing.startswith("eval"):
        assert 'class="verdict none">No verdict' in text


def test_empty_folder_and_missing_folder(tmp_path):
    text = training_report(tmp_path).read_text()
    assert "has not been evaluated" in text and "No update has been logged" in text
    with pytest.raises(FileNotFoundError, match="nowhere"):
        training_report(tmp_path / "nowhere")


def test_deleted_pictures_are_marked(run_dir):
    shutil.rmtree(run_dir / "eval" / "after" / "images")
    assert "not kept" in training_report(run_dir).read_text()


def test_unreadable_pieces_are_named(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "rew')
    (run_dir / "run.json").write_text("{")
    (run_dir / "eval" / "after" / "result.json").write_text('{"format": 0}')
    run = read_run(run_dir)
    assert len(run.problems) == 3 and run.updates == 60 and run.after is None
    assert run.total("nfe") == 6000 and run.total("seconds") == 120.0
    assert "Problem: 1 unreadable line(s)" in training_report(run_dir).read_text()


def test_fair_sample_ignores_scores_and_repeats():
    rows = list(range(100))
    assert fair_sample(rows, 5, "x") == fair_sample(rows, 5, "x") != fair_sample(rows, 5, "y")
    assert fair_sample(rows[:3], 5) == rows[:3]


def test_prompt_diversity_falls_when_pictures_collapse(run_dir):
    result = EvalResult.load(run_dir / "eval" / "after" / "result.json")
    before = prompt_diversity(result)
    first: dict[str, bytes] = {}
    for row in result.rows:
        path = result.image_path(row)
        path.write_bytes(first.setdefault(row.prompt, path.read_bytes()))
    assert before > 0.1 and prompt_diversity(result) == 0.0


def test_large_pictures_are_scaled_down_and_small_ones_kept(tmp_path):
    for side, kept in ((64, True), (512, False)):
        path = tmp_path / f"{side}.png"
        Image.new("RGB", (side, side), "red").save(path)
        address, pixelated = data_uri(path.read_bytes())
        assert pixelated is kept and address.startswith("data:image/png;base64,")


def test_markup_escapes_text_and_attributes_only():
    assert el("p", EVIL, title=EVIL).count("<") == 2
    assert el("p", el("b", "x"), None, ["y", Markup("<i>z</i>")]) == "<p><b>x</b>y<i>z</i></p>"
    assert el("details", open=True, hidden=False, id=None) == "<details open></details>"


def test_numbers_read_well():
    assert ticks(0.12, 0.93) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert len(ticks(0.3, 0.3)) >= 2 and ticks(0, 0, zero=True)[0] == 0
    assert spaced(1.00002, 1e-5) == "1.00002" and spaced(0.5, 0.25) == "0.5"
    assert number(-0.25) == "−0.25" and number(1_234_567.0) == "1,234,567"
    assert points(-0.0001) == "0.0" and points(0.117) == "+11.7" and points(-0.02) == "−2.0"
    assert duration(59) == "59.0 s" and duration(3600 * 2.5) == "2 h 30 min"


def test_line_chart_breaks_at_gaps_and_survives_nothing():
    broken = line_chart([Line("x", [0, 1, 2, 3], [1.0, float("nan"), 2.0, 3.0])])
    assert "nan" not in broken and re.search(r'd="M[^"]*M', broken)
    assert "No values yet" in line_chart([Line("x", [], [])])
    assert "<svg" in line_chart([Line("x", [5], [2.0])])


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_browser_shows_sections_and_decodes_every_picture(run_dir, tmp_path):
    file = training_report(run_dir)
    shot = tmp_path / "shot.png"
    with Chromium(tmp_path) as browser:
        page = browser.tab(1200, 2400)
        page.open(f"file://{file}")
        page.until("document.readyState === 'complete' && document.images.length")
        assert page.js("document.images.length") == file.read_text().count("<img ")
        assert page.js("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.js("document.documentElement.scrollWidth <= innerWidth")
        headings = page.js("[...document.querySelectorAll('h2')].map(h => h.innerHTML)")
        assert [s for s in SECTIONS if s not in headings] == []
        assert not page.errors()
        page.shot(shot)
    with Image.open(shot) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
