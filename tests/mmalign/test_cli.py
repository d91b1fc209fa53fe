"""The command line: what each command passes on, prints and returns."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mmalign
from mmalign.cli import COMMANDS, is_expected, main, parse
from mmalign.commands.common import CommandError, image_files, table
from mmalign.config import ConfigError
from mmalign.types import Media, Score
from vision_rewards.factory import load_reward


@dataclass(frozen=True, kw_only=True)
class Recipe:
    lr: float = 1e-4


class FakeApi(types.ModuleType):
    """Records calls; ``answers`` says what each function returns or raises."""

    def __init__(self) -> None:
        super().__init__("mmalign.api")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            answer = self.answers.get(name)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return call


@pytest.fixture
def api(monkeypatch):
    """A stand-in for ``mmalign.api``."""
    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "mmalign.api", fake)
    monkeypatch.setattr(mmalign, "api", fake, raising=False)
    return fake


def test_every_command_has_a_module():
    for name in COMMANDS:
        assert importlib.util.find_spec(f"mmalign.commands.{name.replace('-', '_')}")


def test_verbs_are_reachable_from_the_package(api):
    mmalign.train("recipe")
    assert api.calls == [("train", ("recipe",), {})]
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        mmalign.tarin  # noqa: B018


def test_train(api):
    assert main(["train", "r.yaml", "a.b=1", "--output-dir", "d", "c=2", "--no-preflight"]) == 0
    options = {"output_dir": "d", "preflight": False, "resume": True, "report": True}
    assert api.calls == [("train", ("r.yaml", ["a.b=1", "c=2"]), options)]


def test_show(api, capsys):
    api.answers["resolve_recipe"] = Recipe(lr=0.5)
    assert main(["train", "r", "--show", "lr=0.5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# config hash ") and out.endswith("\nlr: 0.5\n")
    assert api.calls == [("resolve_recipe", ("r", ["lr=0.5"]), {})]


@pytest.mark.parametrize("argv", [["train"], ["train", "r", "--no-such"], ["score", "--x=1"], []])
def test_bad_arguments_stop_at_once(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2
    assert "mmalign" in capsys.readouterr().err


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    images = Media(torch.rand(3, 3, 8, 8)).to_pil()
    for name, image in zip(("10.png", "9.png", "1.png"), images, strict=True):
        image.save(folder / name)
    (folder / "note.txt").write_text("")
    return folder


def test_score(api, pictures, tmp_path, capsys):
    value = torch.tensor([0.5, float("nan"), 1.0])
    parts = {"count": torch.tensor([1.0, float("nan"), 0.0])}
    valid = torch.tensor([True, False, True])
    api.answers["score"] = Score(value, valid, parts, ("", "too dark", ""), "judge-1")
    out = tmp_path / "scores.jsonl"
    argv = ["score", "--reward", "a,b=0.5", "--images", str(pictures), "--prompt", "a cat"]
    assert main([*argv, "--out", str(out)]) == 0
    ((_, (files, prompts, reward), _),) = api.calls
    assert [f.name for f in files] == ["1.png", "9.png", "10.png"]
    assert prompts == ["a cat"] * 3 and reward == "a,b=0.5"
    printed = capsys.readouterr().out
    assert "unscored" in printed and "too dark" in printed
    assert "mean 0.7500 over 2 of 3 pictures; 1 unscored; judge-1" in printed
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["value"] for r in records] == [0.5, None, 1.0]
    assert [r["valid"] for r in records] == [True, False, True]
    assert records[1]["parts"] == {"count": None} and records[1]["note"] == "too dark"


def test_score_wants_one_prompt_or_one_each(api, pictures, tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\nb\n")
    argv = ["score", "--reward", "a", "--images", str(pictures), "--prompts", str(prompts)]
    assert main(argv) == 2
    assert "2 prompts for 3 pictures" in capsys.readouterr().err
    assert api.calls == []


def test_evaluate(api, capsys):
    def part(n: int) -> SimpleNamespace:
        interval = SimpleNamespace(mean=0.5, low=0.4, high=0.6, defined=True)
        return SimpleNamespace(accuracy=interval, n=n, unscored=1)

    api.answers["evaluate"] = SimpleNamespace(
        benchmark="shapes", version="1", policy="p", tasks={"counting": part(10)}, overall=part(60),
        seconds=2.0, nfe=100.0, folder=None, numbers={"overall": 0.5}, training={}, unit="share",
        rows=(), problems=("two of one kind",), limited=False,
    )  # fmt: skip
    assert main(["evaluate", "--policy", "p", "--steps", "8", "--lora", "l"]) == 0
    assert api.calls == [("evaluate", ("p", "shapes"), {"report": True, "lora": "l", "steps": 8})]
    out = capsys.readouterr().out
    assert "counting" in out and "[0.400, 0.600]" in out and "mean over tasks" in out
    assert "note: Two of one kind." in out


@pytest.mark.parametrize("ok", [True, False])
def test_preflight(api, capsys, ok):
    checks = [SimpleNamespace(name="ratio", ok=True, detail="1.0")]
    checks.append(SimpleNamespace(name="spread", ok=ok, detail="reward is constant"))
    api.answers["preflight"] = SimpleNamespace(ok=ok, checks=checks)
    assert main(["preflight", "r"]) == (0 if ok else 1)
    assert ("FAIL  spread: reward is constant" in capsys.readouterr().out) is not ok


def test_bench_report_pretrain(api, capsys):
    api.answers.update(bench={"images_per_s": 2.0}, report="run/report.html", pretrain="out")
    assert main(["bench", "--policy", "p", "--batch-size", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"images_per_s": 2.0}
    assert main(["report", "run"]) == 0 and main(["pretrain", "flow", "steps=3"]) == 0
    assert api.calls[0] == ("bench", ("p",), {"batch_size": 4})
    assert api.calls[1] == ("report", ("run",), {"out": None})
    assert api.calls[2] == ("pretrain", ("flow", ["steps=3"]), {"output_dir": None})


def test_list(capsys):
    assert main(["list", "kernels", "--json"]) == 0
    assert "flow_sde" in json.loads(capsys.readouterr().out)["kernels"]
    assert main(["list", "methods"]) == 0
    assert "best_of_n" in capsys.readouterr().out
    assert main(["list", "reward"]) == 0
    assert "shapes_strict" in capsys.readouterr().out
    assert main(["list", "kernals"]) == 2
    assert "Did you mean 'kernels'" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = {(f["section"], f["name"]): f for f in json.loads(capsys.readouterr().out)}
    assert findings["core", "torch"]["status"] == "ok"
    assert findings["run", "forward pass"]["status"] == "ok"
    extras = [f for (section, _), f in findings.items() if section == "extras"]
    assert all(f["status"] == "ok" or "pip install 'mmalign[" in f["detail"] for f in extras)
    assert main(["doctor", "--no-forward"]) == 0
    assert "accelerator" in capsys.readouterr().out


def test_doctor_reports_a_broken_core(monkeypatch, capsys):
    import mmalign.commands.doctor as doctor

    def fail() -> str:
        raise RuntimeError("kernel image missing")

    monkeypatch.setattr(doctor, "_tiny_forward", fail)
    assert main(["doctor"]) == 1
    assert "kernel image missing" in capsys.readouterr().out


def test_expected_errors_are_one_line(api, capsys):
    api.answers["train"] = ConfigError("unknown key 'x'")
    assert main(["train", "r"]) == 2
    assert capsys.readouterr().err == "mmalign: error: unknown key 'x'\n"
    with pytest.raises(ConfigError):
        main(["train", "r", "--debug"])


def test_bugs_keep_their_traceback(api):
    api.answers["train"] = KeyError("oops")
    with pytest.raises(KeyError):
        main(["train", "r"])


def test_interrupt(api, capsys):
    api.answers["train"] = KeyboardInterrupt()
    assert main(["train", "r"]) == 130


def test_which_errors_are_expected():
    def caught(function: Any, *args: Any) -> BaseException:
        with pytest.raises(Exception) as info:
            function(*args)
        return info.value

    assert is_expected(caught(Media, torch.zeros(2)))  # a ValueError of a line of ours
    assert is_expected(caught(load_reward, "a=x"))
    assert is_expected(caught(open, "/no/such/file"))
    assert not is_expected(caught(int, "x"))
    assert not is_expected(caught(torch.zeros(2).view, 3))


def test_installed_style_process(cli):
    done = cli("list", "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("mmalign: error: unknown kind 'nothing'")
    assert cli("--version").stdout.strip() == f"mmalign {mmalign.__version__}"


def test_helpers(tmp_path):
    assert table([["a", 1.0], ["bb", None]], ["x", "value"]) == "x    value\na   1.0000\nbb       -"
    with pytest.raises(CommandError, match="holds no picture"):
        image_files([str(tmp_path)])
    with pytest.raises(CommandError, match="no picture or folder"):
        image_files([str(tmp_path / "none.png")])


def test_rewards_are_listed_with_everything_that_is_declared(capsys):
    from vision_rewards.cards import CARDS

    assert main(["list", "rewards"]) == 0
    printed = capsys.readouterr().out
    assert "higher is better" in printed
    for _, info in CARDS:
        rows = "".join(r for r in printed.splitlines() if r.startswith(f"{info.name} "))
        for said in (info.summary, info.licence, info.checkpoint, info.source):
            assert said in rows, info.name
        ends = ["inf" if end is None else f"{end:g}" for end in info.range]
        assert f"{'-' if info.range[0] is None else ''}{ends[0]}..{ends[1]}" in rows
        assert (" GB" in rows or " MB" in rows) == (info.parameters > 0), info.name
        assert info.source != "generic" and (":" in info.source or "ISBN" in info.source), info.name


def test_one_reward_is_listed_in_full(capsys):
    assert main(["list", "rewards", "pickscore"]) == 0
    page = capsys.readouterr().out
    for said in ("3.94 / 1.97 GB", "higher is better", "MIT", "arXiv:2305.01569", "986.1 million"):
        assert said in page
    assert main(["list", "rewards", "contrast"]) == 0
    assert "memory" not in capsys.readouterr().out
    assert main(["list", "rewards", "pickscore", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["rewards"].values()
    assert facts["memory_bytes"] == {"fp32": 3_944_400_000, "bf16": 1_972_200_000}
    assert facts["direction"] == "higher is better"
