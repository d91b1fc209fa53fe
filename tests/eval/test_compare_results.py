"""Comparisons prompt by prompt, and leaderboards that never mix what does not belong together."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from eval.benchmarks.shapes import ShapesBenchmark
from eval.compare import ComparisonError, by_prompt, compare_results, holm, read_results
from eval.harness import run_benchmark
from eval.leaderboard import LeaderboardError, read_boards
from eval.result import EvalResult, Row, summarise
from mmalign import cli


def result(values, unit="share", **settings):
    """A result with a value (or ``None``) for each task, prompt and sample."""
    rows = tuple(
        Row(key=f"{t}-{p}-{s}", prompt=p, task=t, sample=s, seed=s, value=v, valid=v is not None)
        for (t, p, s), v in values.items()
    )
    tasks, overall = summarise(rows)
    said = {"options": {}, "scorer": "x@1", **settings}
    return EvalResult(benchmark="b", version="1", label="", policy="p", settings=said, rows=rows,
                      tasks=tasks, overall=overall, unit=unit, available=len(rows))  # fmt: skip


def test_a_prompt_is_the_mean_of_its_scored_pictures():
    values = {("t", "a", 0): 1.0, ("t", "a", 1): 0.0, ("t", "b", 0): None, ("t", "c", 0): 1.0,
              ("t", "c", 1): None}  # fmt: skip
    assert by_prompt(result(values)) == {("t", "a"): 0.5, ("t", "c"): 1.0}
    assert by_prompt(result(values), 0.0)[("t", "c")] == 0.5


def test_difference_is_the_mean_over_tasks_of_prompts():
    a = {("x", str(i), 0): 0.0 for i in range(12)} | {("y", "q", 0): 1.0, ("y", "r", 0): 0.0}
    b = {**a, ("x", "0", 0): 1.0, ("x", "1", 0): 1.0, ("x", "2", 0): 1.0, ("y", "q", 0): 0.0}
    found = compare_results({"a": result(a), "b": result(b)}).others[0]
    # Task x: 3 of 12 better; task y: 1 of 2 worse.
    assert found.difference.interval.mean == pytest.approx((3 / 12 - 1 / 2) / 2)
    assert [found.count(o) for o in ("win", "tie", "loss")] == [3, 10, 1]
    assert found.tone == "unclear"


def test_permutation_test_weighs_tasks_alike():
    """Two prompts, one a task: of the four swaps two are as far from zero as what was found."""
    a = {("x", "p", 0): 0.0, ("y", "q", 0): 0.0}
    b = {("x", "p", 0): 1.0, ("y", "q", 0): 1.0}
    assert compare_results({"a": result(a), "b": result(b)}).others[0].p_value == pytest.approx(0.5)
    same = compare_results({"a": result(a), "b": result(a)}).others[0]
    assert same.p_value == 1.0 and same.count("tie") == 2


def test_holm_by_hand():
    # Sorted .01 .02 .04: times 3, 2, 1 = .03, .04, .04.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02, 0.001]) == pytest.approx([0.02, 0.002])


def test_scores_of_another_scale_are_compared_too():
    a = {("t", f"p{i}", 0): 20.0 + i for i in range(12)}
    b = {k: v + 0.5 + 0.01 * v for k, v in a.items()}
    found = compare_results({"a": result(a, "score"), "b": result(b, "score")}).others[0]
    assert found.tone == "gain" and found.p_value < 0.01 and found.counting_unscored is None
    assert found.difference.interval.mean == pytest.approx(0.5 + 0.01 * 25.5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "2"}, "differ in version: '1' and '2'"),
        ({"settings": {"options": {"split": "train"}, "scorer": "x@1"}}, "differ in options"),
        ({"settings": {"options": {}, "scorer": "x@2"}}, "differ in scorer"),
    ],
)
def test_other_benchmarks_are_refused(change, said):
    one = result({("t", "a", 0): 1.0})
    with pytest.raises(ComparisonError, match=said):
        compare_results({"a": one, "b": replace(one, **change)})


def test_what_a_reader_must_know():
    a = result({("t", "a", 0): 1.0, ("t", "b", 0): 1.0}, steps=10)
    b = result({("t", "a", 0): 1.0, ("t", "b", 0): None}, steps=20)
    b = replace(b, training={"judged_by": ["x"], "seen": 1, "prompts": 2})
    said = " ".join(compare_results({"a": a, "b": b}).others[0].cautions)
    assert "steps differs: 10 and 20" in said and "1 prompts were not scored in both" in said
    assert "trained on the reward that judges here (x)" in said and "1 of its prompts" in said
    with pytest.raises(ComparisonError, match="two results or more"):
        compare_results({"a": a})


# --- on real results ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(studio, tmp_path_factory):
    """A weak, a strong and a limited evaluation."""
    base = tmp_path_factory.mktemp("board")
    benchmark = ShapesBenchmark(prompts_per_task=6, samples_per_prompt=1)
    for name, skill, options in (
        ("weak", 0.3, {}),
        ("strong", 0.95, {}),
        ("part", 1.0, {"limit": 6}),
    ):
        run_benchmark(studio.Painter(skill), benchmark, base / name, progress=False, label=name,
                      generate=studio.Sketch(skill=skill), **options)  # fmt: skip
    return base


def test_compare_command(folders, tmp_path, capsys):
    page, numbers = tmp_path / "page.html", tmp_path / "n.json"
    command = ["compare", str(folders / "weak"), str(folders / "strong" / "result.json"),
               str(folders / "part"), "--out", str(page), "--json", str(numbers)]  # fmt: skip
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "painter strong is better" in said and "baseline: painter weak" in said
    data = json.loads(numbers.read_text())
    assert [c["name"] for c in data["comparisons"]] == ["painter strong", "painter part"]
    text = page.read_text()
    assert text.count("data:image/png;base64,") > 6 and "Won: " in text and "Lost: " in text
    assert "<script" not in text
    assert cli.main(["compare", str(folders / "weak")]) == 2
    assert cli.main(["compare", str(folders / "weak"), str(folders / "none")]) == 2
    assert "give folders of evaluations" in capsys.readouterr().err


def test_results_of_one_name_are_told_apart_by_folder(folders, tmp_path):
    shutil.copytree(folders / "weak", tmp_path / "again")
    names = list(read_results([folders / "weak", tmp_path / "again"]))
    assert names[1].endswith("again") and len(set(names)) == 2
    with pytest.raises(ComparisonError, match="given twice"):
        read_results([folders / "weak", folders / "weak"])


def test_leaderboard_ranks_whole_results_and_marks_parts(folders, tmp_path, capsys):
    (board,) = read_boards(folders)
    assert [e.path.name for e in board.entries] == ["strong", "weak", "part"]
    assert [e.complete for e in board.entries] == [True, True, False]
    assert cli.main(["leaderboard", str(folders), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "leaderboard.md").read_text()
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line[:2] == "| " and line[:4] != "| --"]
    assert rows[1].startswith("| 1 | painter strong |") and rows[2].startswith("| 2 | painter weak")
    assert "first 6 of 36 pictures only: not ranked" in rows[3] and rows[3].startswith("| – |")
    assert "10 steps, guidance 3, 64 x 64" in rows[1]
    assert "painter strong" in (tmp_path / "leaderboard.html").read_text()


@pytest.mark.parametrize("key", ["version", "scorer", "options"])
def test_leaderboard_refuses_to_mix(folders, tmp_path, key):
    for name in ("weak", "strong"):
        shutil.copytree(folders / name, tmp_path / name, ignore=shutil.ignore_patterns("images"))
    path = tmp_path / "weak" / "result.json"
    data = json.loads(path.read_text())
    data["settings"][key] = {"split": "other"} if key == "options" else "other"
    path.write_text(json.dumps(data))
    with pytest.raises(LeaderboardError, match=rf"in one table: {key} is .*weak"):
        read_boards(tmp_path)


def test_leaderboard_of_nothing(tmp_path):
    (tmp_path / "result.json").write_text('{"format": 1, "rows": []}')  # of another command
    with pytest.raises(FileNotFoundError, match="holds no result"):
        read_boards(tmp_path)
