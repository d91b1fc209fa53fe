"""Equal compute: the budget of a run, the table of methods, and the runner with real processes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from eval.in_training import evaluate_in_training
from eval.methods.claims import read_claims
from eval.methods.page import comparison_page
from eval.methods.read import read_comparison
from eval.methods.records import pack, unpack
from eval.methods.summary import Summary
from mmalign.config import ConfigError
from mmalign.registry import UnknownNameError
from mmalign.runtime.log import read_jsonl
from trainers import entry
from trainers.comparison.prepare import prepare
from trainers.comparison.runner import _base, plan, run_all, state_of
from trainers.comparison.table import OTHERS, SHIPPED, Method, Table, choose, read_table
from trainers.skips import TrainingError

STEP = 40  # evaluations of a step of the cheap recipe: 8 images, 3 steps, 2 of them trained


# --- the budget of a run -----------------------------------------------------------------------


def evaluated(labels: list[str], fail_at: str = ""):
    """An evaluation that only notes its label; it dies at one of them."""

    def evaluate(policy, config, folder, label):
        labels.append(label)
        if label == fail_at:
            raise KeyboardInterrupt

    return evaluate


@pytest.mark.parametrize(("budget", "steps"), [(1, 1), (STEP, 1), (95, 2), (105, 3), (10**6, 3)])
def test_a_run_ends_nearest_to_its_budget(kit, tmp_path, budget, steps):
    config = kit.cheap(tmp_path, max_nfe=budget)
    log = read_jsonl(entry.train(config, reward=kit.brightness) / "metrics.jsonl")
    assert [r["nfe"] for r in log] == [STEP * (k + 1) for k in range(steps)]
    ended = json.loads((tmp_path / "run.json").read_text())
    assert ended["finished"] and ended["nfe"] == STEP * steps


def test_evaluations_every_so_many_evaluations_survive_a_kill(kit, tmp_path):
    config = kit.cheap(
        tmp_path / "a", steps=5, save_every=1, max_nfe=5 * STEP, evaluation__every_nfe=2 * STEP - 5
    )
    whole: list[str] = []
    entry.train(config, reward=kit.brightness, evaluate=evaluated(whole))
    # Multiples at 75 and 150 are passed at 80 and 160; 225 lies beyond the budget.
    assert whole == ["before", "step_000002", "step_000004", "after"]
    again = replace(config, output_dir=str(tmp_path / "b"))
    cut: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        entry.train(again, reward=kit.brightness, evaluate=evaluated(cut, "step_000002"))
    rest: list[str] = []
    entry.train(again, reward=kit.brightness, evaluate=evaluated(rest))
    assert rest == ["step_000002", "step_000004", "after"]
    more: list[str] = []
    larger = replace(again, max_nfe=7 * STEP, steps=7)
    entry.train(larger, reward=kit.brightness, evaluate=evaluated(more))
    assert more == ["step_000006", "after"]


def test_a_negative_budget_is_refused(kit, tmp_path):
    with pytest.raises(ConfigError, match="max_nfe"):
        kit.cheap(tmp_path, max_nfe=-1)


# --- the table ---------------------------------------------------------------------------------


def test_every_shipped_row_is_a_run_that_could_start():
    table = read_table()
    runs = plan(table)
    assert len(runs) == len(table.methods) * len(table.seeds) and len(table.methods) >= 20
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.seed for run in runs[: len(table.methods)]} == {table.seeds[0]}
    for run in runs:
        config = run.config
        assert config.max_nfe == table.nfe and config.seed == run.seed
        assert config.steps * config.batch * config.rollout.steps > table.nfe
    # One base model and one set of pictures, or curves would not start at one point.
    assert len({(r.config.policy, r.config.evaluation) for r in runs}) == 1
    for method in table.methods.values():
        assert method.control or (method.claim and method.paper)


@pytest.mark.parametrize("name", OTHERS)
def test_rows_of_the_tables_beside_it_could_start_too(name):
    table = read_table(name)
    read_claims(table.claims)
    runs = plan(table)
    assert len(runs) == len(table.methods) * 3
    judged = f"shapes_{name}" if name in ("control", "subject") else "shapes"
    assert {run.config.evaluation.benchmark for run in runs} == {judged}
    assert len(plan(choose(table, short=True))) == 4


def test_a_few_step_student_is_judged_in_the_steps_that_it_is_made_for():
    steps = {r.method: r.config.evaluation.steps for r in plan(read_table("few_step"))}
    assert steps == {"lcd": 4, "dmd": 4, "r0": 4, "rg_lcd": 2, "lcd_two": 2, "rg_lcd_pixels": 2}


def test_a_rehearsal_beside_it_says_what_was_judged(tmp_path):
    chosen = choose(read_table("subject"), ["rpo"], [0], 60, short=True)
    record = run_all(chosen, tmp_path, jobs=1)
    assert [r["state"] for r in record["runs"]] == ["finished"]
    page = comparison_page(Summary(read_comparison(tmp_path)), tmp_path / "comparison.html")
    said = page.read_text(encoding="utf-8")
    assert "accuracy is the verdict on subject and composition" in said and "v triangle" in said


@pytest.mark.parametrize(
    ("name", "better", "than", "own"),
    [
        (SHIPPED, "turning_point", "dense_group", {"algorithm", "objective"}),
        (SHIPPED, "euphonium", "no_guide", {"objective.strength", "objective.distill"}),
        (SHIPPED, "reinflow", "sparse", {"algorithm", "objective", "rollout.kernel"}),
        ("misled", "srum", "srum_whole", {"objective.regions"}),
        ("misled_ratio", "parrot", "sum", {"advantage.select"}),
        ("misled", "raft", "no_choice", {"objective.top", "forward.draws"}),
    ],
)
def test_the_sides_of_a_claim_differ_in_nothing_else(name, better, than, own):
    table = read_table(name)
    assert any((c["better"], c["than"]) == (better, than) for c in table.claims)
    sides = {r.method: r.config for r in plan(choose(table, [better, than], [0]))}
    one, two = (entry._flat(asdict(sides[name])) for name in (better, than))
    differ = {k for k in one.keys() | two.keys() if one.get(k) != two.get(k)} - {"output_dir"}
    assert differ and all(any(k == o or k.startswith((f"{o}.", f"{o}_")) for o in own)
                          for k in differ)  # fmt: skip


def test_choosing_rows_keeps_claims_that_can_be_decided():
    table = choose(read_table(), ["dense_grpo", "sparse"], [7], 500)
    assert list(table.methods) == ["dense_grpo", "sparse"] and table.reference == "dense_grpo"
    assert [c["better"] for c in table.claims] == ["dense_grpo"]
    assert (table.seeds, table.nfe) == ((7,), 500)
    short = choose(read_table(), short=True)
    assert len(short.seeds) == 2 and plan(short)[0].config.prompts_per_step == 2


def test_rows_on_pairs_train_on_what_is_prepared():
    table = choose(read_table("preferences"), ["dpo", "sail", "mapo", "flow_grpo"], [0], 0)
    assert set(table.prepare) == {"misled", "pairs", "few"} and "60" in table.prepare["few"]
    runs = {run.method: run for run in plan(table, Path("x"))}
    where = {name: run.config.pairs and run.config.pairs.data for name, run in runs.items()}
    assert where == {
        "dpo": "x/prepared/pairs", "sail": "x/prepared/few", "mapo": "x/prepared/pairs",
        "flow_grpo": None,
    }  # fmt: skip
    # 144 rows, 2 draws: with the reference's pass a step is 576 evaluations, without it 288.
    for name, cost in (("dpo", 576), ("mapo", 288)):
        assert runs[name].config.steps * cost > table.nfe
    assert set(choose(read_table("preferences"), ["flow_grpo", "d3po"]).prepare) == {"misled"}
    short = choose(read_table("preferences"), ["dpo"], short=True)
    assert short.prepare["pairs"][-4:] == ("--pairs", "24", "-o", "margin=0.01")
    row = Method(title="t", recipe="shapes_dpo", overrides=('pairs.data="{out}/pears"',))
    with pytest.raises(UnknownNameError, match="'pears'"):
        replace(table, methods={**table.methods, "t": row})


def test_a_base_is_lent_where_it_is_sampled_alike():
    """Of two students of four steps, one steps along the path and one noises afresh."""
    tables = [read_table(name) for name in (SHIPPED, "gradients", "few_step")]
    runs = {r.method: r for table in tables for r in plan(table)}
    assert _base(runs["vgpo"]) == _base(runs["flow_grpo"])
    assert _base(runs["draft"]) != _base(runs["flow_grpo"])  # its steps are even
    assert _base(runs["lcd"]) != _base(runs["dmd"])
    assert _base(runs["lcd"])[:-1] == _base(runs["dmd"])[:-1]
    # ReFL's chains end early: steps must outlast a budget that each of them spends little of.
    least = plan(choose(read_table("gradients"), ["refl"], [0]))[0].config
    assert least.panel is None and least.steps * least.batch * 2 > least.max_nfe


def test_rows_without_pairs_are_the_runs_they_were():
    """Their folders are recognised by these settings."""
    run = plan(choose(read_table(), ["flow_grpo"], [1]))[0]
    assert run.overrides == (
        *read_table().overrides, "seed=1", "max_nfe=34000", "evaluation.every_nfe=11334",
        "steps=31",
    )  # fmt: skip


def test_data_is_prepared_once(tmp_path):
    make = ["prefs", "make", "--policy", "tiny-sd3", "--reward", "saturation", "--pairs", "2"]
    make += ["--batch-size", "2", "-o", "steps=2"]
    prepare("pairs", make, tmp_path)
    folder = tmp_path / "prepared" / "pairs"
    assert len(read_jsonl(folder / "pairs.jsonl")) == 2
    (folder / "log.txt").unlink()
    prepare("pairs", make, tmp_path)
    assert not (folder / "log.txt").exists()  # nothing was started
    with pytest.raises(ConfigError, match=r"--pairs 2.*the table now says.*--pairs 3"):
        prepare("pairs", [*make, "--pairs", "3"], tmp_path)


def test_data_that_cannot_be_prepared_fails_its_rows_alone(tmp_path):
    row = Method(title="P", recipe="shapes_dpo", overrides=('pairs.data="{out}/pairs"', *TINY[:1]))
    table = replace(
        tiny_table(), methods={"paired": row}, reference="paired", overrides=(),
        prepare={"pairs": ("prefs", "make", "--pairs", "0")},
    )  # fmt: skip
    record = run_all(table, tmp_path, jobs=1)
    (held,) = record["runs"]
    assert held["state"] == "failed" and "pairs is 0" in held["error"]


def test_data_may_need_other_data(tmp_path):
    """Pairs of a model that is made before them; where that fails, they are not tried."""
    row = Method(title="P", recipe="shapes_dpo", overrides=('pairs.data="{out}/pairs"', *TINY[:1]))
    made = {
        "other": ("prefs", "make"),
        "model": ("prefs", "make", "--pairs", "0"),
        "pairs": ("prefs", "make", "--policy", "{out}/model/pipeline"),
    }
    table = replace(
        tiny_table(), methods={"paired": row}, reference="paired", overrides=(), prepare=made
    )
    assert set(choose(table).prepare) == {"model", "pairs"}
    (held,) = run_all(choose(table), tmp_path, jobs=1)["runs"]
    assert held["state"] == "failed" and "pairs is 0" in held["error"]
    assert not (tmp_path / "prepared/pairs").exists()
    with pytest.raises(ConfigError, match="prepare pairs needs model"):
        replace(table, prepare=dict(reversed(made.items())))
    make = ["prefs", "make", "--policy", "tiny-sd3", "--reward", "saturation", "--pairs", "1"]
    make += ["-o", "steps=1", "-o", "prompts={out}/prompts.txt"]
    (tmp_path / "prepared/prompts.txt").write_text("a red disc\n" * 4)
    prepare("pairs", make, tmp_path)
    assert read_jsonl(tmp_path / "prepared/pairs/pairs.jsonl")[0]["prompt"] == "a red disc"


def test_impossible_tables_are_refused():
    row = Method(title="t", recipe="shapes_flow_grpo")
    fine = {"nfe": 10, "points": 1, "seeds": (0,), "reference": "a", "methods": {"a": row}}
    with pytest.raises(UnknownNameError, match="flow_grpo"):
        choose(read_table(), ["flow_grp"])
    with pytest.raises(UnknownNameError, match=r"method \(than\)"):
        Table(**fine, claims=({"says": "s", "better": "a", "than": "b"},))
    with pytest.raises(ConfigError, match="seeds"):
        Table(**{**fine, "seeds": (0, 0)})
    wrong = Table(**{**fine, "methods": {"a": replace(row, overrides=("optim.lrr=1",))}})
    with pytest.raises(ConfigError, match=r"method a: .*optim\.lr"):
        plan(wrong)


def test_a_table_extends_a_file_beside_it(tmp_path):
    """What it says itself stands, what it prepares is added, and circles are refused."""
    (tmp_path / "mine.yaml").write_text(
        "extends: shared.yaml\nnfe: 500\nreference: a\nprepare: {more: [prefs, make]}\n"
        "methods: {a: {title: A, recipe: shapes_flow_grpo}}\n"
    )
    (tmp_path / "shared.yaml").write_text(SHIPPED.with_name("shared.yaml").read_text())
    mine, shipped = read_table(tmp_path / "mine.yaml"), read_table()
    assert (mine.nfe, mine.points, mine.seeds) == (500, shipped.points, shipped.seeds)
    assert mine.overrides == shipped.overrides
    assert list(mine.prepare) == ["misled", "more"] and not choose(mine).prepare
    (tmp_path / "shared.yaml").write_text("extends: mine.yaml\n")
    with pytest.raises(ConfigError, match="in turn"):
        read_table(tmp_path / "mine.yaml")


# --- the runner --------------------------------------------------------------------------------

TINY = (
    "policy=tiny-sd3", "prompts_per_step=2", "images_per_prompt=4", "rollout.steps=3",
    "rollout.window_start=[0, 1]", "save_every=1", "evaluation.prompts_per_task=1",
    "evaluation.samples_per_prompt=1", "evaluation.steps=2", "model.precision=fp32",
)  # fmt: skip


def tiny_table() -> Table:
    """A method that runs, and one whose policy does not exist, which only its process finds."""
    recipe = "shapes_flow_grpo"
    return Table(
        nfe=120,
        points=2,
        seeds=(0,),
        reference="good",
        overrides=TINY,
        methods={
            "good": Method(title="Good", recipe=recipe),
            "bad": Method(title="Bad", recipe=recipe, overrides=("policy=no-such-policy",)),
        },
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """Both methods with one seed, run two at a time; the first was cut short after a step."""
    out = tmp_path_factory.mktemp("comparison")
    torch.set_num_threads(1)
    run = plan(tiny_table())[0]
    part = replace(run.config, steps=1, output_dir=str(out / run.folder))
    entry.train(part, evaluate=evaluate_in_training)
    ended = out / run.folder / "run.json"
    ended.write_text(json.dumps({**json.loads(ended.read_text()), "finished": False}))
    assert state_of(run, out) == "started"
    return out, run_all(tiny_table(), out, jobs=2)


def test_runs_finish_and_failures_are_named(finished):
    out, record = finished
    states = {r["folder"]: r["state"] for r in record["runs"]}
    assert states == {"good/seed_0": "finished", "bad/seed_0": "failed"}
    (error,) = (r["error"] for r in record["runs"] if r["state"] == "failed")
    assert "no-such-policy" in error and "log.txt" in error
    assert json.loads((out / "comparison.json").read_text())["runs"] == record["runs"]
    folder = out / "good/seed_0"
    ended = json.loads((folder / "run.json").read_text())
    assert ended["finished"] and ended["threads"] == 1 and abs(ended["nfe"] - 120) <= 20
    points = {p.name for p in (folder / "eval").iterdir()}
    assert {"before", "step_000001", "after"} < points  # the cut, besides the budget's half


def test_another_seed_adds_one_run_that_shares_the_base(finished):
    """What is finished stays; the new run gets the base's pictures, which are not made again."""
    out, _ = finished
    kept = out / "good/seed_0/run.json"
    before = kept.stat().st_mtime_ns
    record = run_all(choose(tiny_table(), ["good"], [0, 1]), out)
    assert [r["state"] for r in record["runs"]] == ["finished"] * 2
    assert kept.stat().st_mtime_ns == before
    own, lent = (out / f"good/seed_{s}/eval/before/samples.jsonl" for s in (0, 1))
    assert "seconds" in own.read_text() and lent.read_text() == own.read_text()
    ends = [(out / f"good/seed_{s}/metrics.jsonl").read_text() for s in (0, 1)]
    assert ends[0] != ends[1]
    nothing = run_all(tiny_table(), out, jobs=0)
    assert [r["state"] for r in nothing["runs"]] == ["finished", "missing"]


def test_runs_out_of_records_are_not_run_again(finished, tmp_path):
    """Beside them another seed makes the base's pictures itself: records have none to lend."""
    out, _ = finished
    assert pack(out, tmp_path / "kept.tar.xz") >= 1
    unpack(tmp_path / "kept.tar.xz", tmp_path / "new")
    shutil.rmtree(tmp_path / "new/good/seed_1", ignore_errors=True)
    record = run_all(choose(tiny_table(), ["good"], [0, 1]), tmp_path / "new")
    assert [r["state"] for r in record["runs"]] == ["finished"] * 2
    kept, made = (tmp_path / f"new/good/seed_{s}/eval/before" for s in (0, 1))
    assert not list(kept.rglob("*.png")) and list(made.rglob("*.png"))
    assert Summary(read_comparison(tmp_path / "new")).lines


@pytest.mark.parametrize(
    ("broken", "steps"),
    [("optim.lr=1e30", 1), ("rollout.kernel_options={noise_level: 1e30}", 0)],
)
def test_a_run_that_breaks_down_has_an_outcome(tmp_path, broken, steps):
    """It is kept and not repeated; a recipe that never made a step is broken and tried again."""
    row = Method(title="B", recipe="shapes_flow_grpo", overrides=("reward=saturation", broken))
    table = replace(tiny_table(), methods={"b": row}, reference="b")
    (run,) = plan(table, tmp_path)
    folder = tmp_path / run.folder
    with pytest.raises(TrainingError):
        entry.train(replace(run.config, output_dir=str(folder)), evaluate=evaluate_in_training)
    ended = json.loads((folder / "run.json").read_text())
    assert (ended["finished"], ended["steps"], bool(ended["diverged"])) == (False, steps, steps > 0)
    record = run_all(table, tmp_path, jobs=0)["runs"][0]
    assert record["state"] == state_of(run, tmp_path) == ("diverged" if steps else "started")
    assert record["error"] == ended["diverged"]
    if steps:
        assert run_all(table, tmp_path, jobs=1)["runs"][0]["state"] == "diverged"
        read = read_comparison(tmp_path).methods["b"].runs[0]
        assert read.diverged == ended["diverged"] and read.updates == 1
        assert not (folder / "log.txt").exists()  # nothing was started


def test_other_settings_in_the_folder_are_refused(finished):
    out, _ = finished
    for change in ({"nfe": 160}, {"last": ("optim.lr=1e-5",)}, {"points": 3}):
        with pytest.raises(ConfigError, match="other settings"):
            run_all(replace(tiny_table(), **change), out, jobs=1)


def test_a_run_cut_short_is_resumed(finished, tmp_path):
    """It ended as one that is never stopped."""
    out, _ = finished
    run = plan(tiny_table())[0]
    entry.train(replace(run.config, output_dir=str(tmp_path)), evaluate=evaluate_in_training)
    logs = [read_jsonl(f / "metrics.jsonl") for f in (out / run.folder, tmp_path)]
    rewards = [[(r["step"], r["nfe"], r["reward/mean"]) for r in log] for log in logs]
    assert rewards[0] == rewards[1] and len(rewards[0]) >= 2
