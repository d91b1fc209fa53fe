"""DreamBench on a folder in its official form, with the shipped CLIP as every judge."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from eval.benchmarks.base import DataError
from eval.benchmarks.dreambench import DreamBench
from mmalign.assets import asset
from mmalign.registry import UnknownNameError
from mmalign.shapes import parse, render, sample_scene
from mmalign.types import Media

TEXT = """Classes

subject_name,class
star_toy,star
cat2,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def picture(prompt: str, seed: int):
    return render(sample_scene(parse(prompt), random.Random(seed)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts_and_classes.txt").write_text(TEXT)
    (tmp_path / "star_toy").mkdir()
    for k in range(2):
        picture("a photo of a red star", k).save(tmp_path / "star_toy" / f"0{k}.png")
    return tmp_path


def test_prompts_of_things_and_of_the_living(folder: Path) -> None:
    thing = DreamBench(folder, subject="star_toy", token="<v>")
    assert [p.text for p in thing.load().prompts] == ["a <v> star in the jungle", "a red <v> star"]
    assert [p.facts["bare"] for p in thing.load().prompts][1] == "a red star"
    assert len(thing.requests()) == 2 * 4
    live = DreamBench(folder, subject="cat2")
    assert [p.text for p in live.load().prompts] == ["a sks cat wearing a red hat"]
    with pytest.raises(DataError, match="cat2 holds no picture"):
        _ = live.references
    with pytest.raises(UnknownNameError, match="star_toy"):
        DreamBench(folder, subject="startoy").load()
    with pytest.raises(UnknownNameError, match="clip_t"):
        DreamBench(folder, subject="cat2", rewards={"clip": "clip_i"})


def test_the_subject_itself_is_nearer_than_another(folder: Path, rows) -> None:
    clip = str(asset("shapes-clip"))
    image = {"reward": "clip_i", "checkpoint": clip}
    judges = {"dino": image, "clip_i": image,
              "clip_t": {"reward": "clip_score", "checkpoint": clip}}  # fmt: skip
    benchmark = DreamBench(
        folder, subject="star_toy", rewards=judges, samples_per_prompt=1, device="cpu"
    )
    shown = [picture("a photo of a red star", 0), picture("a photo of two blue squares", 9)]
    score = benchmark.judge(Media.from_pil(shown), benchmark.requests())
    assert score.valid.all() and score.parts["dino"].equal(score.parts["clip_i"])
    assert score.value[0] > score.value[1] + 0.1
    parts = [{n: float(p[k]) for n, p in score.parts.items()} for k in range(2)]
    found = benchmark.numbers(rows(benchmark, score.value.tolist(), parts))
    assert found["DINO"] == pytest.approx(score.value.mean().item())
    assert found["CLIP-T"] == pytest.approx(score.parts["clip_t"].mean().item())
