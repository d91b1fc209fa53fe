"""``mmalign label`` from the command line, and from labels to a trained reward."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from label_server import TOKEN, running
from PIL import Image

from mmalign import cli
from mmalign.assets import asset
from mmalign.commands import label
from mmalign.pictures import read_picture
from mmalign.shapes import COLORS, SHAPES, ObjectSpec, PromptSpec, caption, render, sample_scene
from mmalign.types import Media
from vision_rewards.factory import load_reward
from vision_rewards.labelling.server import Access
from vision_rewards.labelling.tasks import Pair


def arguments(*words: object) -> Any:
    return cli.parse(["label", *map(str, words)])


def error(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["label", *map(str, words)]) == 2
    return capsys.readouterr().err


def picture(path: Path, colour: object = "red") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)  # type: ignore[arg-type]
    return path.name


def test_folders_of_pictures_become_pairs(tmp_path):
    folder = tmp_path / "pictures"
    for name, prompt in (("1a", "x"), ("1b", "x"), ("2a", "y"), ("2b", "y"), ("3", "z")):
        picture(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(prompt)
    pairs = label.tasks(arguments(folder, "--out", tmp_path / "l.jsonl"), tmp_path)
    assert {p.prompt for p in pairs} == {"x", "y"}
    assert {pairs[0].image_a, pairs[0].image_b} == {"pictures/1a.png", "pictures/1b.png"}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one for all")
    found = label.tasks(arguments(folder, "--prompts", prompts), tmp_path)
    assert len(found) == 5
    assert len(label.tasks(arguments(folder, "--prompts", prompts, "--all-pairs"), tmp_path)) == 10


def test_what_evaluation_and_scoring_write_becomes_pairs(tmp_path, monkeypatch):
    folder = tmp_path / "evaluated"
    names = [picture(folder / "images" / f"k-{i}.png", (i, 0, 0)) for i in range(3)]
    rows = [{"key": n[:-4], "prompt": "p", "image": f"images/{n}"} for n in names]
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = label.tasks(arguments(folder), tmp_path)
    assert len(pairs) == 3 and pairs[0].image_a.startswith("evaluated/images/k-")
    monkeypatch.chdir(tmp_path)
    words = ["score", "evaluated/images", "--prompt", "p", "--reward", "jpeg_compressibility"]
    assert cli.main([*words, "--out", "tables/scores.jsonl", "--quiet"]) == 0
    scored = label.tasks(arguments("tables/scores.jsonl"), tmp_path)
    assert {p.key for p in scored} == {p.key for p in pairs}


def test_wrong_combinations_stop_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MMALIGN_LABEL_TOKEN", raising=False)
    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "labels.jsonl"
    row = {"prompt": "p", "image_a": "a.png", "image_b": "b.png"}
    tasks.write_text(json.dumps(row) + "\n")
    assert "give TASKS and --out" in error(capsys, tasks)
    assert "--summary reads labels" in error(capsys, tasks, "--summary", out)
    assert "file of tasks" in error(capsys, tasks, "--out", tasks)
    assert "is a folder" in error(capsys, tasks, "--out", tmp_path)
    assert "repeat is 0.9" in error(capsys, tasks, "--out", out, "--repeat", 0.9)
    assert "annotator is ' '" in error(capsys, tasks, "--out", out, "--annotator", " ")
    wide = ("--host", "0.0.0.0", "--no-token")
    assert "reachable from other machines" in error(capsys, tasks, "--out", out, *wide)
    both = ("--token", "long-enough", "--no-token")
    assert "exclude each other" in error(capsys, tasks, "--out", out, *both)
    assert "a.png: no such file" in error(capsys, tasks, "--out", out)
    assert "neither a .jsonl file nor a folder" in error(capsys, tmp_path / "no", "--out", out)
    assert "--prompts is for a folder" in error(capsys, tasks, "--out", out, "--prompts", tasks)
    assert not out.exists()


def test_tokens(monkeypatch):
    monkeypatch.setenv("MMALIGN_LABEL_TOKEN", "from-the-environment")
    assert label.access(arguments("t")).token == "from-the-environment"
    assert label.access(arguments("t", "--token", "from-the-line")).token == "from-the-line"
    assert label.access(arguments("t", "--no-token")).token is None
    monkeypatch.delenv("MMALIGN_LABEL_TOKEN")
    assert label.access(arguments("t")).token not in (None, label.access(arguments("t")).token)


WARM = ("red", "orange", "yellow", "pink")


def scenes(folder: Path, count: int, seed: int) -> tuple[list[Pair], dict[bytes, bool]]:
    """Pairs of one shape each, and which pictures, by their bytes, are of a warm colour."""
    rng, warm, pairs = random.Random(seed), {}, []
    for number in range(count):
        shape = rng.choice(SHAPES)
        for side in "ab":
            color = rng.choice(list(COLORS))
            file = folder / f"{number}{side}.png"
            render(sample_scene(PromptSpec((ObjectSpec(shape, color),)), rng)).save(file)
            warm[file.read_bytes()] = color in WARM
        prompt = f"{caption(PromptSpec((ObjectSpec(shape),)))}, {number}"
        pairs.append(Pair(prompt, f"{number}a.png", f"{number}b.png"))
    return pairs, warm


def look_and_decide(server: SimpleNamespace, user: str, warm: dict[bytes, bool]) -> None:
    """Somebody who looks at what the server sends, likes warm colours, and errs once."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        state = client.get("/api/state", params={"user": user}).json()
        while task := state["task"]:
            left, right = (
                warm[client.get(f"/api/image/{task[side]}").content] for side in ("left", "right")
            )
            choice = "tie" if left == right else "left" if left else "right"
            if state["done"] == 2 and (state["last"] or {}).get("choice") != "skip":
                wrong = {"user": user, "task": task["id"], "choice": "skip"}
                state = client.post("/api/decide", json=wrong).json()
                back = {"user": user, "task": state["last"]["task"]}
                state = client.post("/api/undo", json=back).json()
                assert state["task"] == task
            body = {"user": user, "task": task["id"], "choice": choice, "seconds": 1.0}
            state = client.post("/api/decide", json=body).json()


def test_from_labels_to_a_reward(tmp_path, capsys):
    pairs, warm = scenes(tmp_path, 60, seed=1)
    with running(pairs, tmp_path / "labels.jsonl", Access(token=TOKEN)) as server:
        for user in ("ann", "bob"):
            look_and_decide(server, user, warm)
    settings = [f"data={tmp_path / 'labels.jsonl'}", f"backbone.checkpoint={asset('shapes-clip')}",
                "device=cpu", "head.kind=linear", "head.features=image", "fit.epochs=40",
                "fit.lr=1e-2", "loss.name=davidson"]  # fmt: skip
    assert cli.main(["train-reward", *settings, "--output-dir", str(tmp_path / "taste")]) == 0
    reward = load_reward(str(tmp_path / "taste"))
    (tmp_path / "fresh").mkdir()
    fresh, warm = scenes(tmp_path / "fresh", 40, seed=2)
    files = [file for pair in fresh for file in pair.files(tmp_path / "fresh")]
    with torch.no_grad():
        media = Media.from_pil([read_picture(file) for file in files])
        value = reward.score(media, [""] * len(files)).value
    liked = torch.tensor([warm[file.read_bytes()] for file in files])
    # Of all couples of a warm and another picture the share in which the warm one scores more.
    right = (value[liked][:, None] > value[~liked][None]).float().mean()
    assert right >= 0.9
    assert cli.main(["label", "--summary", str(tmp_path / "labels.jsonl")]) == 0
    text = capsys.readouterr().out
    assert "ann and bob" in text and "60 shared pairs" in text
