"""The comparison of steering methods: its table, real runs, claims at equal compute, the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.methods.claims import Claim, decide
from eval.methods.judges import measured
from eval.methods.markdown import tables
from eval.methods.read import Comparison, MethodRuns, RunCurve, read_comparison
from eval.methods.summary import Summary
from eval.result import EvalResult, Row, summarise
from eval.steering.one import One, read_spec, write_spec
from eval.steering.runner import plan, run_all, state_of
from eval.steering.table import Model, choose, read_table
from eval.steering.table import Row as Method
from eval.steering.timing import Timing, _done
from mmalign.cli import main
from mmalign.config import ConfigError
from mmalign.registry import STEERERS, UnknownNameError
from mmalign.runtime.settings import SettingsMismatchError

SAMPLER = {"steps": 2, "guidance_scale": 1.0}


def small_table():
    """Two methods on the shipped generator, one whose model does not exist, one left out."""
    shipped = read_table()
    models = {
        "base": Model(policy="shapes-flow", **SAMPLER),
        "gone": Model(policy="no-such-policy", **SAMPLER),
        "tuned": Model(policy="", **SAMPLER),
    }
    methods = {
        "best_of_n": Method(title="best of N", method="best_of_n", options={"n": 999}),
        "fk": Method(title="FK", method="fk", options={"k": 999}, claim="k beat k"),
        "bad": Method(title="bad", method="fk", model="gone"),
        "tuned": Method(title="tuned", model="tuned", control=True),
    }
    claims = (
        {"says": "FK wins", "better": "fk", "than": "best_of_n", "at": "equal_nfe"},
        {"says": "base reaches tuned", "better": "fk", "than": "tuned", "margin": -0.02},
    )
    return replace(
        shipped, reward="shapes_partial", judges=("shapes_artifact",), seeds=(0, 1), models=models,
        prompts_per_task=1, budgets=(4, 8), methods=methods, claims=claims, short=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """Runs made here, but for the one that fails, which is a process of its own."""
    out, table = tmp_path_factory.mktemp("steering"), small_table()
    for run in plan(table):
        if not run.skip and run.method != "bad":
            write_spec(run.spec, out / run.folder)
            One(run.spec, out / run.folder).go()
    return out, run_all(replace(table, seeds=(0,)), out) | {"all": run_all(table, out, jobs=0)}


def result(out: Path, spot: str, method: str = "best_of_n", seed: int = 0) -> EvalResult:
    return EvalResult.load(out / method / f"seed_{seed}" / "eval" / spot / "result.json")


def test_every_method_is_compared_or_said_to_be_left_out():
    table = read_table()
    compared = {row.method for row in table.methods.values() if row.method}
    assert {e.name for e in STEERERS} - compared == {"refine", "random_search"}
    page = (Path(__file__).parents[2] / "docs/steering-comparison.md").read_text()
    assert "`refine` needs" in page and "`random_search` makes" in page


def test_every_shipped_row_can_run(tmp_path):
    runs = plan(choose(read_table()))
    assert {r.method for r in runs if r.skip} == {"tuned", "tuned_best_of_n", "tuned_fk"}
    assert [r.seed for r in runs[:14]] == [0] * 14 and len(runs) == 3 * 14
    lora = plan(choose(read_table(), ["tuned"], tuned=str(tmp_path)))[0]
    assert (lora.spec.policy, lora.spec.lora) == ("shapes-flow", str(tmp_path)) and not lora.skip
    (tmp_path / "model_index.json").write_text("{}")
    whole = plan(choose(read_table(), ["tuned"], tuned=str(tmp_path)))[0]
    assert (whole.spec.policy, whole.spec.lora) == (str(tmp_path), None)
    beam = next(r.spec for r in runs if r.method == "path_search")
    assert [p.options["width"] for p in beam.points] == [1, 2, 4]


def test_another_reward_changes_judges_claims_strengths_and_who_can_run():
    clip, partial = choose(read_table()), choose(read_table(), reward="shapes_partial")
    assert clip.judges == ("partial", "shapes_artifact")
    assert partial.judges == ("shapes_clip", "shapes_artifact")
    assert {c.get("measure") for c in partial.claims} == {None, "shapes_partial"}
    left = {r.method for r in plan(partial) if "gradient" in r.skip}
    assert left == {"das", "reno", "dno", "reward_guidance"}
    strengths = [
        next(r.spec.points[0].options for r in plan(t) if r.method == "fk") for t in (clip, partial)
    ]
    assert strengths[0]["strength"] == 30 and "strength" not in strengths[1]
    with pytest.raises(UnknownNameError, match="shapes_clip"):
        plan(choose(read_table(), reward="shapes_clp"))


def test_tables_that_make_no_sense_are_refused():
    table = small_table()
    row = table.methods["best_of_n"]
    for change, said in (
        ({"budgets": (8, 4)}, "must rise"),
        ({"sizes": {"n": (1,)}}, "one for each"),
        ({"model": "bse"}, "bse"),
    ):
        with pytest.raises((ConfigError, UnknownNameError), match=said):
            replace(table, methods={**table.methods, "best_of_n": replace(row, **change)})
    with pytest.raises(UnknownNameError, match="equal_nfe"):
        replace(table, claims=({**table.claims[0], "at": "equal_nfes"},))
    with pytest.raises(ConfigError, match=r"fk: .*strenght"):
        bad = replace(table.methods["fk"], options={"strenght": 3})
        plan(replace(table, methods={**table.methods, "fk": bad}))
    with pytest.raises(ConfigError, match="no such folder"):
        choose(table, tuned="no/such/folder")


def test_runs_end_at_their_budgets_and_failures_are_named(finished):
    out, record = finished
    states = {r["method"]: r for r in record["runs"]}
    assert states["best_of_n"]["state"] == states["fk"]["state"] == "finished"
    assert states["bad"]["state"] == "failed" and "no-such-policy" in states["bad"]["error"]
    assert states["tuned"]["state"] == "left out" and "--tuned" in states["tuned"]["error"]
    for method in ("best_of_n", "fk"):
        ended = json.loads((out / method / "seed_0/run.json").read_text())
        assert [p["nfe"] for p in ended["points"]] == [2, 4, 8]
        assert [p["decodes"] >= n for p, n in zip(ended["points"], (1, 2, 4), strict=True)]
        assert all(0 < p["working"] <= p["seconds"] for p in ended["points"])


def test_all_methods_start_from_the_same_pictures(finished):
    out, _ = finished
    pictures = [
        {r.key: result(out, "bare", m).image_path(r).read_bytes() for r in result(out, "bare").rows}
        for m in ("best_of_n", "fk")
    ]
    assert pictures[0] == pictures[1]
    seeds = [{r.seed for r in result(out, "bare", seed=s).rows} for s in (0, 1)]
    assert not seeds[0] & seeds[1]


def test_more_samples_raise_the_steering_reward(finished):
    """Best of 4 contains best of 2 contains the bare picture; files round, verdicts may flip."""
    out, _ = finished
    for seed in (0, 1):
        spots = ("bare", "nfe_000004", "nfe_000008")
        means = [measured(result(out, s, seed=seed), "shapes_partial").mean() for s in spots]
        assert means[0] <= means[1] + 0.05 and means[1] <= means[2] + 0.05
        assert means[2] > means[0]
    best, rows = result(out, "nfe_000008"), result(out, "nfe_000008").rows
    assert measured(best, "partial").tolist() == [r.partial for r in rows]


def test_a_run_cut_short_goes_on_at_its_budget(finished, tmp_path):
    import shutil

    out, _ = finished
    run = plan(small_table())[0]
    folder = tmp_path / run.folder
    shutil.copytree(out / run.folder, folder)
    kept = folder / "eval/nfe_000004/result.json"
    before, made = kept.stat().st_mtime_ns, result(out, "nfe_000008")
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "eval/nfe_000008")
    assert state_of(run, tmp_path) == "started"
    One(read_spec(folder), folder).go()
    assert state_of(run, tmp_path) == "finished" and kept.stat().st_mtime_ns == before
    again = result(tmp_path, "nfe_000008")
    assert [r.value for r in again.rows] == [r.value for r in made.rows]
    for row in made.rows:
        assert again.image_path(row).read_bytes() == made.image_path(row).read_bytes()

    other = plan(replace(small_table(), budgets=(4, 6)))[0]
    with pytest.raises(ConfigError, match="other settings"):
        state_of(other, tmp_path)
    data = json.loads(kept.read_text())
    kept.write_text(json.dumps({**data, "settings": {**data["settings"], "weights": "others"}}))
    with pytest.raises(SettingsMismatchError, match="other weights"):
        One(read_spec(folder), folder).go()


# -- claims and columns on known numbers ---------------------------------------------------------


def evaluation(share: float, seed: int, chance: int) -> EvalResult:
    rows = [
        Row(key=f"p{k}", prompt=f"prompt {k}", task=f"task {k % 2}", sample=0, seed=seed,
            value=float((k + chance) % 24 < 24 * share), valid=True, partial=share)
        for k in range(24)
    ]  # fmt: skip
    tasks, overall = summarise(rows)
    return EvalResult(benchmark="shapes", version="1", label="", policy="p", settings={},
                      rows=tuple(rows), tasks=tasks, overall=overall)  # fmt: skip


def known(name: str, nfe: list[float], seconds: list[float], shares: list[float]) -> MethodRuns:
    costs = [
        {"nfe": n, "seconds": s, "working": s / 1.25, "reward_calls": n - nfe[0], "decodes": n}
        for n, s in zip(nfe, seconds, strict=True)
    ]
    runs = [
        RunCurve(seed, 0, np.array(nfe), np.array(seconds),
                 tuple(evaluation(share, seed, seed) for share in shares), tuple(costs))
        for seed in range(3)
    ]  # fmt: skip
    beside = "" if name == "many" else "many"
    row = {"title": name, "proxies": ["partial"], "beside": beside}
    return MethodRuns(name, row, tuple(runs))


@pytest.fixture
def comparison() -> Comparison:
    """``slow`` is ahead of ``many`` at equal evaluations, and behind in equal time."""
    methods = [
        known("many", [1, 2, 4, 8], [1, 2, 4, 8], [0.25, 0.375, 0.5, 0.75]),
        known("slow", [1, 2, 4], [1, 4, 8], [0.25, 0.375, 0.625]),
        known("none", [1], [1], [0.5]),
    ]
    table = {
        "kind": "steering", "reference": "many", "reward": "partial", "seeds": [0, 1, 2],
        "threads": 1, "claims": [], "runs": [], "methods": {},
    }  # fmt: skip
    return Comparison(Path(), table, {m.name: m for m in methods})


def test_curves_have_budgets_of_their_own(comparison):
    assert comparison.grid_of("slow").tolist() == [1, 2, 4]
    assert comparison.values("many").shape == (3, 4, 24, 1)
    assert comparison.reached(("many", "slow"), "nfe") == 4
    assert comparison.reached(("many", "slow"), "seconds") == 8
    between = comparison.values("slow", ("partial",), np.array([6.0]), "seconds")
    assert between == pytest.approx(0.5)  # half way from 0.375 at 4 s to 0.625 at 8 s
    assert comparison.values("slow", ("partial",), np.array([99.0])) == pytest.approx(0.625)


def test_claims_at_equal_evaluations_in_equal_time_and_at_each_end(comparison):
    def word(**claim) -> tuple[str, float]:
        made = decide(comparison, Claim(says="s", **claim))
        return made.word, round(made.interval.mean, 6)

    slow = {"better": "slow", "than": "many"}
    assert word(**slow, at="equal_nfe") == ("supported", 0.125)
    assert word(**slow, at="equal_time") == ("not supported", -0.125)
    assert word(**slow) == ("not supported", -0.125)
    assert word(better="many", than="none", at="equal_nfe") == ("not supported", -0.25)
    assert word(better="many", than="none", margin=-0.02) == ("supported", 0.25)


def test_columns_of_a_row(comparison):
    lines = {line.runs.name: line for line in Summary(comparison).lines}
    ahead = lines["slow"].ahead
    assert ahead["nfe"].mean == pytest.approx(0.125)
    assert ahead["seconds"].mean == pytest.approx(-0.125)
    assert lines["many"].ahead == {} and lines["none"].ahead == {}
    assert lines["slow"].overhead == pytest.approx(0.25) and lines["none"].overhead is None
    text = tables(Summary(comparison))
    assert "| 25.0 % |" in text and "+12.5 [" in text and "steered by partial" in text


# -- the command ---------------------------------------------------------------------------------


def test_the_command_writes_page_and_tables(finished, tmp_path, capsys):
    out, _ = finished
    table, said = tmp_path / "table.yaml", tmp_path / "results.md"
    record = json.loads((out / "comparison.json").read_text())
    for row in record["methods"].values():
        del row["proxies"], row["beside"]
    own = ("reward", "judges", "seeds", "prompts_per_task", "budgets", "reference", "models",
           "methods", "claims")  # fmt: skip
    table.write_text(yaml.safe_dump({name: record[name] for name in own}))
    command = ["bench", "steering", "--table", str(table), "--jobs", "0", "--out", str(out)]
    assert main([*command, "--markdown", str(said)]) == 0
    assert "best of N" in capsys.readouterr().out
    page = (out / "comparison.html").read_text()
    assert "<script" not in page and "Steering reward against seconds" in page
    assert "bare pipeline" in page and "no-such-policy" not in page  # seed 1 never ran
    text = said.read_text()
    assert "undecided (no finished run of tuned)" in text and "give the tuned model" in text
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {c["verdict"] for c in found["claims"]} <= {"supported", "not supported", "undecided"}
    assert found["methods"]["fk"]["own_overhead"] > 0
    assert set(found["methods"]["fk"]["ahead_of_best_of_n"]) == {"nfe", "seconds"}
    assert read_comparison(out).pictures.tasks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nfe", "9"], "--nfe"),
        (["--policy", "shapes-flow"], "--policy"),
        (["--reward", "a", "b"], "one reward steers"),
        (["--methods", "fkk"], "fk"),
        (["--jobs", "-1"], "--jobs"),
    ],
)
def test_options_that_do_not_belong_here(options, said, capsys, tmp_path):
    assert main(["bench", "steering", *options, "--out", str(tmp_path / "out")]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- seconds ----------------------------------------------------------------------------------


def test_rows_are_timed_alone_once_and_their_seconds_are_shown(finished, capfd):
    out, _ = finished
    assert {f.parent.name for f in out.glob("*/timing.json")} == {"best_of_n", "fk"}
    kept = json.loads((out / "fk/timing.json").read_text())
    spots = ["bare", "nfe_000004", "nfe_000008"]
    assert [p["spot"] for p in kept["points"]] == spots and kept["spec"]["method"] == "fk"
    assert all(p["seconds"] >= p["working"] > 0 for p in kept["points"])
    assert [p["nfe"] for p in kept["points"]] == [2, 4, 8]
    run = read_comparison(out).methods["fk"].runs[0]
    assert run.seconds.tolist() == [p["seconds"] for p in kept["points"]]
    own = [p["seconds"] for p in json.loads((out / "fk/seed_0/run.json").read_text())["points"]]
    assert run.seconds.tolist() != own
    capfd.readouterr()
    run_all(replace(small_table(), seeds=(0,)), out)  # tries what failed, times nothing again
    assert "timed alone" not in capfd.readouterr().err


def test_other_options_are_timed_anew(finished, tmp_path):
    out, _ = finished
    run = next(r for r in plan(small_table()) if r.method == "fk")
    assert _done(Timing("fk", run.spec, run.folder), out)
    assert not _done(Timing("fk", replace(run.spec, steps=3), run.folder), out)
    assert not _done(Timing("fk", run.spec, run.folder), tmp_path)
