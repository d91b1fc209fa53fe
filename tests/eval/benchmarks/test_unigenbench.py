"""UniGenBench: every kind of judge, Chinese files, answers of the authors' scripts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from eval.benchmarks.base import DataError
from eval.benchmarks.unigenbench import UniGenBench
from mmalign.registry import UnknownNameError
from mmalign.types import Media

POINTS = {"0": ["Style", "Action - Hand"], "7": ["Action - Animal"]}
SERVER = {"backoff": 0.01, "retries": 1, "timeout": 5.0}


def table(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def english(folder: Path, name: str = "test_prompts_en.csv") -> Path:
    rows = []
    for index, names in POINTS.items():
        record = {"Primary Categories": "Art", "Testpoints": names,
                  "Testpoint Description": [f"about {n}" for n in names]}  # fmt: skip
        rows.append([index, f"prompt {index}", json.dumps(record)])
    return table(folder / name, ["index", "prompt_en", "sub_dims_en"], rows)


def pictures(count: int) -> Media:
    return Media(torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def judge(chat, name: str) -> dict:
    return {"reward": name, "url": chat.url, "model": "tiny", "server": SERVER}


def test_chinese_prompts_are_asked_about_in_chinese(tmp_path: Path, chat) -> None:
    record = {"一级垂类": "艺术", "考点": ["风格", "属性-数量"], "考点对应描述": ["水墨", "两只"]}
    cells = ["3", "两只熊猫", json.dumps(record, ensure_ascii=False)]
    path = table(tmp_path / "test_prompts_zh.csv", ["index", "prompt_zh", "sub_dims_zh"], [cells])
    chat.respond = lambda c: (
        "<analysis>['水墨', '三只']</analysis><score>[1, 0]</score>" if "考点" in c.text else "?"
    )
    spec = judge(chat, "checklist_judge")
    for data, options in ((path, {}), (tmp_path, {"split": "zh"})):
        benchmark = UniGenBench(data, reward=spec, samples_per_prompt=1, **options)
        score = benchmark.judge(pictures(1), benchmark.requests())
        assert score.value.tolist() == [0.5] and benchmark.options["language"] == "zh"
        assert benchmark.requests()[0].task == "艺术"
    with pytest.raises(DataError, match=r"holds none of test_prompts_en\.csv"):
        UniGenBench(tmp_path).load()


def test_any_reward_that_gives_a_probability_is_asked_point_by_point(tmp_path: Path, chat) -> None:
    def answer(c):
        top = {"yes": -0.1, "no": -2.5} if "Hand" in c.text else {"yes": -2.5, "no": -0.1}
        token = chat.token(max(top, key=top.get), top)
        return chat.said("yes", logprobs={"content": [token]})

    chat.respond = answer
    benchmark = UniGenBench(english(tmp_path), reward=judge(chat, "yes_no_judge"),
                            samples_per_prompt=1)  # fmt: skip
    score = benchmark.judge(pictures(2), benchmark.requests())
    assert score.value.tolist() == [0.5, 0.0] and len(chat.seen) == 3
    assert score.parts["point_1"].isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"'sharpness' gives no probability.*checklist_judge"):
        _ = UniGenBench(english(tmp_path), reward="sharpness").identity  # before any picture


def answers(folder: Path, rows: list[tuple[str, list[str], str]]) -> Path:
    cells = [[name.split("_")[0], "p", str(points), output, "{}", f"flux/{name}.png"]
             for name, points, output in rows]  # fmt: skip
    header = ["index", "prompt", "testpoint", "output", "result_json", "img_path"]
    return table(folder / "flux_en.csv", header, cells)


def test_answers_of_the_authors_scripts(tmp_path: Path, rows) -> None:
    found = answers(tmp_path, [
        ("0_0", POINTS["0"], "<analysis>['a', 'b']</analysis>\n<score>[1, 0]</score>"),
        ("7_0", POINTS["7"], "<score>[1]</score>"),
        ("0_1", POINTS["0"], "<score>[1]</score>"),
    ])  # fmt: skip
    benchmark = UniGenBench(english(tmp_path), answers=found, samples_per_prompt=2)
    requests = benchmark.requests()
    score = benchmark.judge(pictures(4), requests)
    assert [r.key for r in requests] == ["0-0", "0-1", "7-0", "7-1"]
    assert score.valid.tolist() == [True, False, True, False]
    assert score.value[[0, 2]].tolist() == [0.5, 1.0]
    assert "1 entries for 2 test points" in score.notes[1]
    assert "no answer about picture 1 of prompt 7" in score.notes[3]
    parts = [{n: float(p[k]) for n, p in score.parts.items()} for k in range(4)]
    told = rows(benchmark, [0.5, None, 1.0, None], parts)
    # Style 1 of 1, Action - Hand 0 of 1, Action - Animal 1 of 1.
    numbers = benchmark.numbers(told)
    assert numbers["Style"] == 1.0 and numbers["Action"] == 0.5
    assert numbers["micro"] == pytest.approx(2 / 3) and numbers["macro"] == 0.75


def test_answers_that_do_not_fit(tmp_path: Path) -> None:
    path = english(tmp_path)
    wrong = UniGenBench(path, answers=answers(tmp_path, [("7_0", ["Style"], "")]))
    with pytest.raises(DataError, match=r"about \['Style'\].*are \['Action - Animal'\]"):
        wrong.judge(pictures(1), [r for r in wrong.requests() if r.key == "7-0"])
    twice = answers(tmp_path, [("7_0", POINTS["7"], ""), ("7_0", POINTS["7"], "")])
    with pytest.raises(DataError, match=r"line 3: picture 7_0\.png has two answers"):
        UniGenBench(path, answers=twice)
    table(tmp_path / "flux_en.csv", ["index", "output"], [])
    with pytest.raises(DataError, match="no column 'testpoint'"):
        UniGenBench(path, answers=tmp_path / "flux_en.csv")
    with pytest.raises(ValueError, match="either answers or reward"):
        UniGenBench(path, answers=twice, reward="vqascore")
    with pytest.raises(UnknownNameError, match=r"split of unigenbench 'zn'.*'zh'"):
        UniGenBench(path, split="zn")
