"""A few-step generator against its teacher at equal evaluations."""

from __future__ import annotations

import json

import pytest

from eval.few_step import bench_few_step
from mmalign.cli import main


def test_rows_are_at_equal_evaluations_and_a_stopped_run_goes_on(tmp_path):
    options = {"evaluations": [1, 2], "images": 6, "batch_size": 6, "out": tmp_path}
    found = bench_few_step("shapes-turbo", "shapes-flow", **options)
    cells = [
        (r["generator"], r["evaluations"], r["steps"], r["guidance_scale"]) for r in found["rows"]
    ]
    assert cells == [
        ("student", 1, 1, 1.0), ("teacher", 1, 1, 1.0),
        ("student", 2, 2, 1.0), ("teacher", 2, 2, 1.0), ("teacher", 2, 1, 2.0),
    ]  # fmt: skip
    refused, *rest = found["rows"]
    assert "no grid of 1 step" in refused["refused"]
    for row in rest:
        folder = f"{row['generator']}_{row['steps']}_{row['guidance_scale']:g}"
        result = json.loads((tmp_path / folder / "result.json").read_text())
        assert result["nfe"] == 6 * row["evaluations"] and len(result["rows"]) == 6
        assert row["images_per_second"] > 0
        assert row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"]
    again = bench_few_step("shapes-turbo", "shapes-flow", **options)
    assert [r["images_per_second"] for r in again["rows"][1:]] == [None] * 4  # nothing was made
    assert [r["accuracy"] for r in again["rows"][1:]] == [r["accuracy"] for r in rest]
    assert json.loads((tmp_path / "few_step.json").read_text()) == again


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs --policy"),
        (["--policy", "shapes-turbo", "--evaluations", "0"], "no positive number"),
        (["--policy", "shapes-turbo", "--adapter", "lora"], "--adapter does not belong"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, words, capsys):
    assert main(["bench", "few-step", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_its_options_belong_to_it(capsys):
    assert main(["bench", "--policy", "shapes-turbo", "--teacher", "shapes-flow"]) == 2
    assert "mmalign bench few-step" in capsys.readouterr().err
