"""A comparison on disk with known numbers: curves, claims, verdicts, page and tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from eval.methods.claims import Claim, decide, gain, read_claims, statistic_of, verdict
from eval.methods.judges import measured
from eval.methods.markdown import BEGIN, END, claim_cells, tables, write_markdown
from eval.methods.page import comparison_page
from eval.methods.read import read_comparison
from eval.methods.summary import Summary
from eval.statistics import Interval
from mmalign.commands.bench_methods import _plain
from mmalign.config import ConfigError

PROMPTS = 24  # of the fixture


def test_curves_are_read_at_equal_parts_of_the_budget(folder):
    comparison = read_comparison(folder)
    assert list(comparison.methods) == ["base", "early", "late"]
    values = comparison.values("early", ("accuracy", "partial"))
    assert values.shape == (3, 4, PROMPTS, 2)
    assert values[..., 1].mean((0, 2)) == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert comparison.seconds("early") == pytest.approx([0, 6, 12, 18])
    first = comparison.methods["early"].runs[0].results[1]
    assert values[0, 1, :, 0].tolist() == [r.value for r in first.rows]


def test_points_between_evaluations_are_interpolated(folder):
    comparison = read_comparison(folder)
    comparison.table = {**comparison.table, "points": 6}
    values = comparison.values("late")[..., 0]
    assert values[:, 1] == pytest.approx((values[:, 0] + values[:, 2]) / 2)


def test_verdicts_follow_from_the_interval_alone(folder, claims):
    comparison = read_comparison(folder)
    found = [decide(comparison, c).word for c in read_claims(claims)]
    assert found == ["supported", "not supported", "undecided", "supported", "undecided"]
    assert "gone" in decide(comparison, read_claims(claims)[4]).why
    strict = Claim(says="by far", better="late", than="base", margin=0.9)
    assert decide(comparison, strict).word == "not supported"
    assert verdict(gain(comparison, "early")) == "supported"
    assert verdict(gain(comparison, "base")) == "undecided"


def test_words_at_the_edges():
    def word(low: float, high: float, margin: float = 0.0) -> str:
        return verdict(Interval((low + high) / 2, low, high, 1), margin)

    assert word(0.1, 0.2) == "supported" and word(-0.2, -0.1) == "not supported"
    assert word(-0.1, 0.1) == "undecided" and word(0.0, 0.0) == "undecided"
    assert word(-0.01, 0.05, margin=-0.02) == "supported"
    assert word(float("nan"), float("nan")) == "undecided"


def cells(*points: tuple[float, ...]) -> np.ndarray:
    """``(1, 1, 1, P, Q)``: one method whose measures are known at every point."""
    return np.array(points, float)[None, None, None]


def test_statistics_by_hand():
    def value(a, b, **claim) -> float:
        made = Claim(says="s", better="a", than="b", **claim)
        units = np.stack([np.zeros((4, 2)), np.full((4, 2), 2.0)]).reshape(1, 1, 8, 2)
        return float(statistic_of(made, units)(a, b)[0])

    a, b = cells((0, 0), (4, 1), (6, 2)), cells((0, 0), (1, 2), (7, 4))
    assert value(a, b) == pytest.approx(-1)
    assert value(a, b, at="curve") == pytest.approx((4 + 6 - 1 - 7) / 2)
    # a ends at proxy 2, which b has reached at its second point, worth 1.
    assert value(a, b, at="equal_proxy") == pytest.approx(6 - 1)
    early = cells((0, 0), (3, 4), (9, 4))  # proxy 4 first at the second point; b at its last
    assert value(early, b, at="equal_proxy") == pytest.approx(3 - 7)
    half = cells((0, 0), (4, 1))  # b at proxy 1 lies half way to its second point
    assert value(half, cells((0, 0), (1, 2)), at="equal_proxy") == pytest.approx(4 - 0.5)
    # Parts with deviation 1: gains 6 and 2 against 7 and 4.
    assert value(a, b, at="minimum", parts=("x", "y")) == pytest.approx(2 - 4)


def test_gains_and_shares_of_gains(folder):
    comparison = read_comparison(folder)

    def about(better: str, than: str, share: float) -> tuple[str, float]:
        claim = Claim(says="s", better=better, than=than, at="gain", share=share)
        found = decide(comparison, claim)
        assert found.interval is not None
        return found.word, found.interval.mean

    word, mean = about("early", "early", 0.0)  # against nothing: the gain itself
    own = gain(comparison, "early").mean
    assert word == "supported" and mean == pytest.approx(own) and own > 0.3
    # Its seeds count once, as in the table of methods.
    itself = Claim(says="s", better="early", than="early", at="gain", share=0.0)
    assert decide(comparison, itself).interval == gain(comparison, "early")
    other = gain(comparison, "late").mean
    assert about("late", "early", 0.5) == ("supported", pytest.approx(other - own / 2))
    assert about("base", "early", 0.5)[0] == "not supported"
    claim = Claim(says="s", better="late", than="early", at="gain", share=0.5)
    cells = claim_cells(decide(comparison, claim))
    assert cells[1] == "late − 0.5 × early" and "gain" in cells[2]
    with pytest.raises(ConfigError, match="share"):
        Claim(says="s", better="late", than="early", share=0.5)


def without(folder: Path, out: Path, name: str, seed: int, state: str) -> Path:
    """The comparison with another state of one run."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    table = json.loads((out / "comparison.json").read_text())
    (held,) = (r for r in table["runs"] if (r["method"], r["seed"]) == (name, seed))
    held["state"] = state
    (out / "comparison.json").write_text(json.dumps(table))
    return out / held["folder"]


def test_no_verdict_before_all_seeds_have_ended(folder, tmp_path, claims):
    without(folder, tmp_path, "late", 1, "failed")
    summary = Summary(read_comparison(tmp_path))
    found = decide(summary.comparison, read_claims(claims)[0])
    assert (found.word, found.why) == ("undecided", "late lacks seed 1")
    assert found.interval is not None and found.interval.defined
    words = {line.runs.name: (line.word, line.lacks) for line in summary.lines}
    assert words["late"] == ("undecided", "late lacks seed 1")
    assert words["early"] == ("supported", "")
    summary.comparison.table = {**summary.comparison.table, "seeds": [0, 2]}
    assert "late has 2 of 3 seeds" in decide(summary.comparison, read_claims(claims)[0]).why


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_that_diverged_counts_as_it_ended(folder, tmp_path, evaluated, claims):
    """Left out, it would leave the method to be judged by the seeds that survived."""
    own = without(folder, tmp_path, "late", 1, "diverged")
    (own / "eval/after").rename(own / "eval/diverged")
    if not evaluated:
        shutil.rmtree(own / "eval/diverged")
    ended = {"steps": 7, "nfe": 700, "seconds": 14.0, "finished": False, "diverged": "norm is nan"}
    (own / "run.json").write_text(json.dumps(ended))
    summary = Summary(read_comparison(tmp_path))
    run = summary.comparison.methods["late"].runs[1]
    assert run.nfe.tolist() == [0, 300, 600, 700][: 4 if evaluated else 3]
    kept = summary.comparison.values("late")[1, -1, :, 0]
    assert kept.tolist() == [r.value for r in run.results[-1].rows]
    assert decide(summary.comparison, read_claims(claims)[0]).why == ""
    said, page = tables(summary), comparison_page(summary, tmp_path / "page.html").read_text()
    assert "Late (1 of 3 diverged)" in said and "judged as they ended: late, seed 1: norm" in said
    assert "Diverged: late, seed 1: norm is nan" in page


def test_claims_after_equal_updates(folder, tmp_path):
    """The budget allows a costly method few updates, and it is ahead of the other after those."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for seed in (0, 1, 2):  # early's log and end: 3 steps of 300 evaluations in the place of 9
        run_folder = tmp_path / f"early/seed_{seed}"
        log = [{"step": s, "nfe": 300 * s, "seconds": 6.0 * s} for s in (1, 2, 3)]
        (run_folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
        for at, spot in ((1, "step_000003"), (2, "step_000006")):
            (run_folder / "eval" / spot).rename(run_folder / "eval" / f"step_{at:06d}")
        ended = json.loads((run_folder / "run.json").read_text())
        (run_folder / "run.json").write_text(json.dumps({**ended, "steps": 3}))
    comparison = read_comparison(tmp_path)
    assert comparison.reached(("early", "late"), "steps") == 3
    claim = Claim(says="s", better="early", than="late", at="equal_updates")
    found = decide(comparison, claim)
    # early after its three updates, 0.8, against late after three of its nine, 0.3
    assert found.word == "supported" and found.interval is not None
    assert found.interval.mean == pytest.approx(0.5, abs=0.1)


def test_claims_that_make_no_sense_are_refused(claims):
    with pytest.raises(ConfigError, match="measur"):
        read_claims([{**claims[0], "measur": "accuracy"}])
    with pytest.raises(ConfigError, match="parts"):
        read_claims([{**claims[0], "at": "minimum"}])


def test_a_run_judged_on_other_pictures_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "late/seed_1/eval/after/result.json"
    data = json.loads(path.read_text())
    data["rows"] = data["rows"][1:]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="late/seed_1/eval/after"):
        _ = read_comparison(tmp_path).pictures


def test_further_judges_see_the_kept_pictures_once(folder):
    found = read_comparison(folder).methods["early"].runs[0].results[0]
    sizes = measured(found, "jpeg_compressibility")
    assert sizes.shape == (PROMPTS,) and np.isfinite(sizes).all() and (sizes < 0).all()
    kept = found.folder / "judges.json"
    written = kept.stat().st_mtime_ns
    assert measured(found, "jpeg_compressibility").tolist() == sizes.tolist()
    assert kept.stat().st_mtime_ns == written
    spoilt = json.loads(kept.read_text())
    spoilt["jpeg_compressibility"]["identity"] = "another version"
    spoilt["jpeg_compressibility"]["values"]["p0"] = 99.0
    kept.write_text(json.dumps(spoilt))
    assert measured(found, "jpeg_compressibility").tolist() == sizes.tolist()


def test_page_and_tables(folder, tmp_path):
    summary = Summary(read_comparison(folder))
    assert [ln.runs.name for ln in summary.lines][-1] == "base"  # controls come last
    text = comparison_page(summary, tmp_path / "page.html").read_text()
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    assert "no &lt;such&gt; policy" in text and "data:image/png" in text
    for said in ("not supported", "undecided", "what early says"):
        assert said in text
    said = tables(summary)
    assert said.count("| supported |") >= 4 and "gone (seed 0): failed" in said
    assert "| 9 | 900 | 18.0 s | partial 0.5 → 0.8 |" in said
    early = next(line for line in summary.lines if line.runs.name == "early")
    assert f"| Early | {100 * early.iqm.mean:.1f} % | [{100 * early.iqm.low:.1f}, " in said
    assert "Trained reward against network evaluations" in text
    _, curve = summary.curve("early", "partial")
    assert [i.mean for i in curve] == pytest.approx([0.5, 0.6, 0.7, 0.8])


def test_everything_of_a_page_is_in_its_json(folder):
    summary = Summary(read_comparison(folder))
    plain = json.loads(json.dumps(_plain(summary)))
    early = plain["methods"]["early"]
    assert early["interquartile_mean"]["mean"] == pytest.approx(summary.lines[0].iqm.mean, abs=0.1)
    assert early["above_reference"]["mean"] == 1.0
    assert plain["methods"]["base"]["above_reference"] is None
    assert [r["error"] for r in plain["unfinished"]] == ["no <such> policy"]
    assert "gone" in plain["claims"][4]["why"]


def test_markdown_goes_between_its_marks(folder, tmp_path):
    summary, path = Summary(read_comparison(folder)), tmp_path / "doc.md"
    path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nEnd.\n")
    once = write_markdown(summary, path).read_text()
    assert once.startswith("# Title\n") and once.endswith("\n\nEnd.\n") and "old" not in once
    assert write_markdown(summary, path).read_text() == once
    path.write_text(once + "<!-- results other -->\n<!-- end of results other -->\nLast.\n")
    both = write_markdown(summary, path, "other").read_text()
    assert both.startswith(once) and both.endswith("<!-- end of results other -->\nLast.\n")
    assert both.count("| method |") == 2 * once.count("| method |")
    path.write_text("no marks")
    with pytest.raises(ValueError, match="results"):
        write_markdown(summary, path)
    assert path.read_text() == "no marks"
