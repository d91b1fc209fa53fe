"""``mmalign steer``: what is written, what a killed run loses, what may not be mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import mmalign
from mmalign.cli import main
from mmalign.policies.load import load_policy
from mmalign.registry import STEERERS
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling import generate
from mmalign.steering.folder import SettingsMismatchError, SteeringFolder
from mmalign.types import Media

PROMPTS = ["a photo of a red star", "a photo of two circles", "a photo of a cross"]
REWARD = '''"""Mean red."""
import numpy as np


def red(images, prompts):
    return [float(np.asarray(i)[..., 0].mean()) / 255 for i in images]
'''


@pytest.fixture
def work(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def words(work: Path, out: str, *more: str, method: str = "best_of_n") -> list[str]:
    known = ["-o", "n=3"] if method == "best_of_n" else []
    return [
        "steer", "--policy", "tiny-sd", "--prompts", str(work / "p.txt"), "--method", method,
        "--reward", f"{work / 'reward.py'}:red", *known, "-o", "steps=2", "--out",
        str(work / out), *more,
    ]  # fmt: skip


def records(folder: Path) -> list[dict]:
    """Records without what differs from run to run."""
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    vary = ("seconds", "memory", "notes")
    return sorted(
        ({k: v for k, v in line.items() if k not in vary} for line in lines),
        key=lambda line: line["index"],
    )


def test_what_is_written(work, capsys):
    assert main(words(work, "out", "--held-out", "jpeg_compressibility", "--chunk", "2")) == 0
    out = work / "out"
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    for i in range(3):
        assert {f"000{i}.png", f"unsteered/000{i}.png", f"candidates/000{i}-02.png"} <= names
    others = {"settings.json", "prompts.jsonl", "steer.json", "contact_sheet.png", "report.html"}
    assert others <= names and len(names) == len(others) + 3 * 5
    summary = json.loads((out / "steer.json").read_text())
    assert summary["prompts"] == PROMPTS and summary["nfe"] == 3 * 3 * 2 * 2
    assert summary["reward_calls"] == 9 and summary["bare_nfe"] == 4
    assert len(summary["held_out_scores"]["jpeg_compressibility"]["steered"]) == 3
    for record, score in zip(records(out), summary["scores"], strict=True):
        own = [c["score"] for c in record["candidates"]]
        assert score == record["score"] == max(own) == own[record["chosen"]]
        assert [c["rank"] for c in record["candidates"]].count(1) == 1
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0 and (out / "report.html").read_bytes() == page
    printed = capsys.readouterr()
    assert "held out: jpeg_compressibility" in printed.out and "9 candidates, 36" in printed.out
    assert "3 of 3 prompts, mean best" in printed.err


def test_the_unsteered_picture_is_the_plain_one_of_the_first_noise(work):
    assert main(words(work, "out", "--no-report", "--limit", "1")) == 0
    assert not (work / "out" / "report.html").exists()
    seed = stable_seed("steering", 0, PROMPTS[0], 0)
    plain, _ = generate(load_policy("tiny-sd"), PROMPTS[:1], [seed], steps=2)
    shown = Media.from_pil([Image.open(work / "out" / "unsteered" / "0000.png")])
    assert (shown.data - plain.data).abs().max() < 2 / 255
    first = Media.from_pil([Image.open(work / "out" / "candidates" / "0000-00.png")])
    assert first.data.equal(shown.data)


@pytest.mark.parametrize("method", ["zero_order", "path_search"])
def test_chunks_and_growing_lists_change_nothing(work, method):
    more = ["-o", "iterations=1"] if method == "zero_order" else []
    assert main(words(work, "whole", "--no-report", *more, method=method)) == 0
    assert main(words(work, "parts", "--no-report", "--limit", "1", *more, method=method)) == 0
    before = (work / "parts" / "0000.png").stat().st_mtime_ns
    assert main(words(work, "parts", "--no-report", "--chunk", "1", *more, method=method)) == 0
    assert (work / "parts" / "0000.png").stat().st_mtime_ns == before
    whole, parts = records(work / "whole"), records(work / "parts")
    for a, b in zip(whole, parts, strict=True):
        assert a["candidates"][0]["seed"] == b["candidates"][0]["seed"]
        assert a["chosen"] == b["chosen"] and a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_a_killed_run_goes_on(work):
    (work / "p.txt").write_text("\n".join(PROMPTS * 4))
    argv = words(work, "out", "--chunk", "1", "--no-report")
    env = {**os.environ, "PYTHONPATH": str(Path(mmalign.__file__).parents[1])}
    command = [sys.executable, "-m", "mmalign", *argv]
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, cwd=work)
    log = work / "out" / "prompts.jsonl"
    try:
        limit = time.monotonic() + 200
        while not (log.exists() and log.read_text().count("\n") > 1):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    finished = log.read_text().count("\n")
    assert finished < 12
    with log.open("a") as file:
        file.write('{"index": 11, "prom')  # what a kill in mid-write leaves
    assert main(argv) == 0
    assert main(words(work, "fresh", "--chunk", "1", "--no-report")) == 0
    again, fresh = records(work / "out"), records(work / "fresh")
    assert [r["prompt"] for r in again] == PROMPTS * 4
    assert [r["chosen"] for r in again] == [r["chosen"] for r in fresh]
    assert [r["sha256"] for r in again] == [r["sha256"] for r in fresh]


def test_damaged_pictures_are_made_again(work, capsys):
    argv = words(work, "out", "--no-report")
    assert main(argv) == 0
    before = records(work / "out")
    (work / "out" / "0001.png").write_bytes(b"torn")
    capsys.readouterr()
    assert main(argv) == 0
    assert "2 of 3 prompts were finished before" in capsys.readouterr().err
    after = records(work / "out")
    assert after[0] == before[0] and after[1]["chosen"] == before[1]["chosen"]
    assert after[1]["score"] == pytest.approx(before[1]["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed", "1"], "seed: 0 there, 1 now"),
        (["-o", "guidance_scale=2.0"], "options"),
        (["--budget", "nfe=100"], "budget"),
        (["--held-out", "jpeg_compressibility"], "held_out"),
    ],
)
def test_runs_are_never_mixed(work, capsys, change, said):
    assert main(words(work, "out", "--no-report", "--limit", "1")) == 0
    assert main(words(work, "out", "--no-report", "--limit", "1", *change)) == 2
    error = capsys.readouterr().err
    assert said in error and "use another folder" in error


def test_other_prompts_are_another_run(work, capsys):
    assert main(words(work, "out", "--no-report", "--limit", "1")) == 0
    (work / "p.txt").write_text("a photo of a blue star")
    assert main(words(work, "out", "--no-report")) == 2
    assert f"holds prompt 0 as {PROMPTS[0]!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--held-out", "REWARD"], "the reward that steers"),
        (["--chunk", "0"], "--chunk must be 1 or more"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--budget", "nfes=3"], "Did you mean 'nfe'"),
        (["-o", "candidates=3"], "option of steering method"),
    ],
)
def test_mistakes_stop_it_before_anything_is_computed(work, capsys, change, said):
    change = [c.replace("REWARD", f"{work / 'reward.py'}:red") for c in change]
    assert main(words(work, "out", *change)) == 2
    assert said in capsys.readouterr().err
    assert not list((work / "out").glob("*.png"))


def test_a_prompt_that_is_too_long_stops_a_long_run_at_once(work, capsys):
    (work / "p.txt").write_text("\n".join([*PROMPTS, "star " * 90]))
    assert main(words(work, "out", "--chunk", "1")) == 2
    assert "tokens" in capsys.readouterr().err and not list((work / "out").glob("*.png"))


def test_budgets_hold(work):
    assert main(words(work, "out", "--no-report", "--budget", "nfe=9", "--limit", "2")) == 0
    summary = json.loads((work / "out" / "steer.json").read_text())
    assert summary["nfe"] == 2 * 8 and len(summary["candidates"]) == 4


def test_wordings_of_a_function_in_a_file(work, capsys):
    (work / "words.py").write_text("def longer(prompt):\n    return [prompt + ' and a cross']\n")
    expand = ["-o", f"expand={work / 'words.py'}:longer"]
    assert main(words(work, "out", "--limit", "1", *expand, method="refine")) == 0
    (record,) = records(work / "out")
    assert [c["text"] for c in record["candidates"]] == [PROMPTS[0], f"{PROMPTS[0]} and a cross"]
    assert "and a cross" in (work / "out" / "report.html").read_text()
    assert main(words(work, "none", "-o", f"expand={work / 'w.py'}:longer", method="refine")) == 2
    assert "expansion file" in capsys.readouterr().err


def test_prompts_of_a_benchmark_and_a_tuned_model(work, capsys):
    """Steering a tuned model is one option more; the benchmark judges, and has no say."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = load_policy("tiny-sd").pipeline
    torch.manual_seed(0)
    pipeline.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(work / "lora", unet_lora_layers=layers)
    argv = [
        "steer", "--policy", "tiny-sd", "--benchmark", "shapes", "--limit", "2", "--reward",
        "jpeg_compressibility", "-o", "n=2", "-o", "steps=2", "--no-report",
    ]  # fmt: skip
    assert main([*argv, "--out", str(work / "base")]) == 0
    assert main([*argv, "--out", str(work / "tuned"), "--lora", str(work / "lora")]) == 0
    base, tuned = (
        json.loads((work / name / "steer.json").read_text()) for name in ("base", "tuned")
    )
    assert base["weights"] != tuned["weights"] and base["prompts"] == tuned["prompts"]
    assert len(base["prompts"]) == 2 and "shapes benchmark" in base["held_out_scores"]
    assert set(base["held_out_scores"]["shapes benchmark"]["steered"]) <= {0.0, 1.0, None}
    assert records(work / "base")[0]["sha256"] != records(work / "tuned")[0]["sha256"]
    assert "held out: shapes benchmark" in capsys.readouterr().out


def test_videos_become_moving_pictures(tmp_path):
    store = SteeringFolder(tmp_path, {}, ["a"])
    video = Media(torch.rand(1, 4, 3, 8, 8))
    store.add(0, {"score": 1.0}, video, video, Media(torch.rand(3, 4, 3, 8, 8)))
    with Image.open(tmp_path / "0000.gif") as moving:
        assert moving.n_frames == 4
    assert (tmp_path / "candidates" / "0000-02.gif").is_file()
    assert not SteeringFolder(tmp_path, {}, ["a"]).missing
    with pytest.raises(SettingsMismatchError):
        SteeringFolder(tmp_path, {}, ["b"])


SMALL = {
    "best_of_n": ["n=2"],
    "das": ["k=2"],
    "dno": ["iterations=2", "permutations=2"],
    "fk": ["k=2"],
    "path_search": ["width=1", "branch=2", "every=1"],
    "random_search": ["rounds=1"],
    "refine": ["expand=WORDS"],
    "reno": ["iterations=2"],
    "reward_guidance": [],
    "svdd": ["children=2"],
    "zero_order": ["iterations=1", "neighbours=2"],
}


def test_every_method_runs_resumes_and_has_its_page(tmp_path, capsys):
    (tmp_path / "words.py").write_text("def longer(prompt):\n    return prompt + ' and a cross'\n")
    assert set(SMALL) == {entry.name for entry in STEERERS}
    for method, options in SMALL.items():
        given = [o.replace("WORDS", f"{tmp_path / 'words.py'}:longer") for o in options]
        argv = [
            "steer", "--policy", "tiny-sd", "--prompt", PROMPTS[0], "--reward", "contrast",
            "--method", method, "-o", "steps=4", "-o", "guidance_scale=1.0",
            *(word for option in given for word in ("-o", option)), "--out", str(tmp_path / method),
        ]  # fmt: skip
        assert main(argv) == 0, method
        (record,) = records(tmp_path / method)
        assert record["score"] == record["candidates"][record["chosen"]]["score"], method
        page = (tmp_path / method / "report.html").read_text()
        drawn = method in ("das", "fk", "path_search", "svdd", "zero_order")
        assert ('class="wide tree"' in page) is drawn, method
        assert main(argv) == 0 and "1 of 1 prompts were finished" in capsys.readouterr().err
