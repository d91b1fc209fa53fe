"""What is wrong with files and folders is named with the way out, and what is right is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from eval.benchmarks.geneval import GenEvalBenchmark
from eval.benchmarks.prompt_sets import PartiPrompts
from eval.reward_benchmarks.answer_files import AnswerPairs
from eval.reward_benchmarks.base import DataError
from mmalign.cli import main

HEAD = "Prompt\tCategory\tChallenge\tNote\n"
PROMPTS = "a cat\tAnimals\tBasic\t\na dog\tAnimals\tBasic\t\na car\tVehicles\tBasic\t\n"


@pytest.fixture
def parti(tmp_path: Path) -> Path:
    """Three prompts, and a folder with a picture of each."""
    (tmp_path / "PartiPrompts.tsv").write_text(HEAD + PROMPTS)
    (tmp_path / "made").mkdir()
    for k in range(3):
        Image.new("RGB", (16, 16), (40 * k, 80, 20)).save(tmp_path / "made" / f"{k:05d}-0.png")
    return tmp_path


def evaluate(folder: Path, *more: str) -> int:
    return main(["evaluate", "--benchmark", "parti", "--data", str(folder / "PartiPrompts.tsv"),
                 "--images", str(folder / "made"), "--quiet", "--no-report",
                 "-o", "reward=jpeg_compressibility", *more])  # fmt: skip


def test_broken_pictures_leave_the_rest_and_strict_says_which(parti: Path, capsys) -> None:
    (parti / "made" / "00001-0.png").write_text("no picture")
    (parti / "made" / "stranger.png").write_bytes(b"")
    assert evaluate(parti, "--out", str(parti / "out"), "--strict") == 2
    said = capsys.readouterr().err
    assert "1 of 3 pictures are unscored (00001-0: " in said and "stranger.png" in said
    assert "what there is lies in" in said
    rows = json.loads((parti / "out" / "result.json").read_text())["rows"]
    assert [row["valid"] for row in rows] == [True, True, False]  # in turn over the categories
    (parti / "made" / "00001-0.png").unlink()
    assert evaluate(parti, "--strict") == 2
    said = capsys.readouterr().err
    assert "1 of 3 pictures of parti are missing" in said and "without --strict" in said


def test_a_folder_in_another_layout_is_no_result_of_nothing(parti: Path, capsys) -> None:
    assert evaluate(parti, "--layout", "unigenbench") == 2
    said = capsys.readouterr().err
    assert "holds not one of the 3 pictures of parti (layout 'unigenbench')" in said
    assert "--layout" in said and "00000-0.png" in said


def test_repeated_prompts_and_unusable_rows_are_named(parti: Path, capsys) -> None:
    path = parti / "PartiPrompts.tsv"
    path.write_text(HEAD + PROMPTS + "a  cat\tAnimals\tBasic\t\n\tAnimals\tBasic\t\n")
    loaded = PartiPrompts(path, reward="jpeg_compressibility").load()
    assert len(loaded.prompts) == 4
    assert loaded.problems[0] == "PartiPrompts.tsv, line 6: column 'Prompt' is empty or missing"
    assert "1 prompts occur more than once in PartiPrompts.tsv, such as" in loaded.problems[1]
    assert "(00000 and 00003)" in loaded.problems[1]
    assert evaluate(parti) == 0
    assert "note: PartiPrompts.tsv, line 6" in capsys.readouterr().out  # the name as it is
    path.write_text("Text\tCategory\na cat\tAnimals\n")
    assert evaluate(parti) == 2
    assert "no column 'Prompt'; it has ['Text', 'Category']" in capsys.readouterr().err


def test_results_that_cannot_be_read_are_named(parti: Path, capsys) -> None:
    assert evaluate(parti, "--out", str(parti / "a")) == 0
    good = json.loads((parti / "a" / "result.json").read_text())
    for text, why in (
        (json.dumps({**good, "colour": 1}), "unknown column of result 'colour'"),
        (json.dumps(good)[:200], "line 1 column"),
        (json.dumps({k: v for k, v in good.items() if k != "rows"}), "it lacks 'rows'"),
    ):
        (parti / "b").mkdir(exist_ok=True)
        (parti / "b" / "result.json").write_text(text)
        capsys.readouterr()
        assert main(["compare", str(parti / "a"), str(parti / "b")]) == 2
        said = capsys.readouterr().err
        assert str(parti / "b" / "result.json") in said and why in said
        assert "run its evaluation again" in said


def test_misspelt_keys_of_a_clause_and_lines_that_are_no_json(tmp_path: Path) -> None:
    clause = {"class": "cat", "count": 1}
    lines = [json.dumps({"tag": "colors", "prompt": f"a red cat {k}", "include": [one]})
             for k, one in enumerate((clause, {**clause, "colour": "red"}))]  # fmt: skip
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join([*lines, "{broken"]))
    problems = GenEvalBenchmark(path).load().problems
    assert "line 2" in problems[0] and "Did you mean 'color'" in problems[0]
    assert "line 3: not JSON" in problems[1]


def test_rows_of_reward_benchmarks_say_why_they_are_unusable(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path.write_text("\n".join([json.dumps(good), "{broken", "[1]", '{"prompt": "q"}']))
    problems = AnswerPairs(path).load().problems
    assert "row 2: it is not JSON" in problems[0] and "no object but a list" in problems[1]
    assert "no 'chosen'; the row has prompt" in problems[2]
    (tmp_path / "pairs.tsv").write_text("x")
    with pytest.raises(DataError, match=r"'\.tsv' is no table; use \.jsonl, \.json, \.csv"):
        AnswerPairs(tmp_path / "pairs.tsv").load()


def test_a_prompt_file_without_the_column_says_what_it_has(parti: Path, capsys) -> None:
    (parti / "wrong.csv").write_text("image,text\n00000-0.png,a cat\n")
    code = main(["score", str(parti / "made"), "--reward", "jpeg_compressibility", "--prompts",
                 str(parti / "wrong.csv"), "--out", str(parti / "s.csv")])  # fmt: skip
    assert code == 2 and not (parti / "s.csv").exists()
    assert "no text in 'prompt', it has text; name the column" in capsys.readouterr().err
