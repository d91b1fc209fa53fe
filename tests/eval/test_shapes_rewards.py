"""The shapes-world reward benchmark: known truth, controlled differences, rewards that differ."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from PIL import ImageChops

from eval.reward_benchmarks.base import DataError
from eval.reward_benchmarks.offline import JUDGES, judges, offline_rewards, quick_rewards
from eval.reward_benchmarks.run import declared, evaluate_rewards
from eval.reward_benchmarks.scoring import Settings
from eval.reward_benchmarks.shapes import CATEGORIES, GENERATED, ShapesRewards
from eval.reward_benchmarks.shapes_pairs import CHANGES, SPOILERS, TASKS_OF, scene_pair
from mmalign import cli
from mmalign.commands.common import CommandError
from mmalign.commands.evaluate_reward import rewards_of
from mmalign.registry import REWARD_BENCHMARKS, REWARDS, UnknownNameError
from mmalign.shapes import sample_spec

DRAWN = [c for c in CATEGORIES if c != GENERATED]


def specs(category: str, count: int = 12) -> list:
    rng = random.Random(category)
    found = []
    while len(found) < count:
        spec = sample_spec(rng, "test", rng.choice(TASKS_OF[category]))
        pair = scene_pair(category, spec, rng, len(found))
        if pair is not None:
            found.append((spec, *pair))
    return found


@pytest.mark.parametrize("category", CHANGES)
def test_only_one_of_two_scenes_shows_what_the_prompt_asks_for(category):
    for spec, right, wrong in specs(category):
        assert right.satisfies(spec) and not wrong.satisfies(spec)
        assert right.background == wrong.background


def test_differences_are_the_ones_named():
    for _, right, wrong in specs("color"):
        assert [o.shape for o in right.objects] == [o.shape for o in wrong.objects]
        assert sum(a != b for a, b in zip(right.objects, wrong.objects, strict=True)) == 1
    changes = []
    for _, right, wrong in specs("count"):
        changes.append(len(wrong.objects) - len(right.objects))
        assert len({o.shape for o in wrong.objects}) == 1
    assert changes == [-1, 1] * 6
    for _, right, wrong in specs("swapped"):
        assert [o.color for o in right.objects] == [o.color for o in wrong.objects][::-1]
    for _, right, wrong in specs("relation"):
        assert {(o.x, o.y, o.radius) for o in right.objects} == {
            (o.x, o.y, o.radius) for o in wrong.objects
        }
    for _, right, wrong in specs("extra"):
        assert wrong.objects[:-1] == right.objects


@pytest.mark.parametrize("category", SPOILERS)
def test_spoiled_pictures_differ_from_clean_ones_and_are_drawn_the_same_again(category):
    item = ShapesRewards(generated=0).pair(category, 3)
    right, wrong = sorted(item.candidates, key=lambda c: c.maker)
    assert (right.maker, wrong.maker) == ("right", "wrong")
    change = np.asarray(ImageChops.difference(right.open(), wrong.open()), float)
    assert 0.5 < change.mean() < 60
    assert wrong.open().tobytes() == wrong.open().tobytes()


def test_items_are_a_function_of_the_seed():
    one, two = (ShapesRewards(pairs=2, generated=0).load().items for _ in range(2))
    assert [i.category for i in one] == DRAWN * 2
    for a, b in zip(one, two, strict=True):
        assert (a.prompt, a.truth) == (b.prompt, b.truth)
        assert [c.open().tobytes() for c in a.candidates] == [
            c.open().tobytes() for c in b.candidates
        ]
    other = ShapesRewards(pairs=2, generated=0, seed=1).load().items
    assert [i.prompt for i in other] != [i.prompt for i in one]
    assert [i.key for i in ShapesRewards(pairs=9, generated=0).load(5).items] == [
        i.key for i in one[:5]
    ]


def test_the_right_picture_comes_first_about_half_the_time():
    items = ShapesRewards(pairs=20, generated=0).load().items
    first = sum(i.truth == (1.0, 0.0) for i in items) / len(items)
    assert 0.4 < first < 0.6


def test_rewards_are_good_at_what_they_are_made_for():
    benchmark = ShapesRewards(pairs=8, generated=0)
    report = evaluate_rewards(
        benchmark, ["shapes_strict", "shapes_clip", "shapes_artifact", "jpeg_compressibility"]
    )
    strict, clip, artifact = (report[f"shapes_{n}"] for n in ("strict", "clip", "artifact"))
    assert all(strict.categories[c].mean == 1 for c in CHANGES)
    assert 0.5 <= strict.categories["blur"].mean < 0.8  # mostly both are right: a tie
    assert np.mean([clip.categories[c].mean for c in CHANGES]) > 0.85
    assert all(artifact.categories[c].mean > 0.85 for c in SPOILERS)
    assert report.rows[-1].label == "jpeg_compressibility"
    assert report["jpeg_compressibility"].categories["blur"].mean == 0


def test_generated_pictures_are_a_choice_of_four():
    benchmark = ShapesRewards(categories=[GENERATED], generated=6)
    items = benchmark.load().items
    assert all(len(i.candidates) == 4 and 0 < sum(i.truth) < 4 for i in items)
    report = evaluate_rewards(benchmark, ["shapes_strict", "shapes_clip"])
    assert report["shapes_strict"].measures["best of 4"].mean == 1  # it is the judge here
    assert report["shapes_clip"].measures["best of 4"].n == len(items)


def test_judges_run_in_both_forms():
    specs = {k: v for k, v in judges().items() if k in ("judge: vqascore", "judge: pairwise")}
    settings = Settings(batch_size=16)
    report = evaluate_rewards(ShapesRewards(pairs=1, generated=0), specs, settings=settings)
    pairwise = report["judge: pairwise"].measures
    assert "same verdict in both orders" in pairwise and "calibration error" in pairwise
    assert "same verdict in both orders" not in report["judge: vqascore"].measures
    assert all(row.items == len(DRAWN) for row in report.rows)


def test_every_offline_reward_is_there_and_needs_nothing_else():
    for label, spec in offline_rewards().items():
        info = declared(spec)
        assert info is not None and set(info.needs) <= {"prompt", "opponent"}, label
    used = {o["reward"] for o in JUDGES.values()} | set(quick_rewards())
    weightless = {e.name for e in REWARDS if not e.info.checkpoint.strip()}
    # There is no text to read, and there are no pictures of a subject.
    left_out = {"ocr", "ocr_strict", "lambda_harmonic"}
    assert weightless - left_out <= used
    shipped = {e.name for e in REWARDS if e.info.checkpoint.startswith("assets/")}
    assert shipped <= used


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(DataError, match="draws its own pictures"):
        ShapesRewards("data")
    with pytest.raises(DataError, match="unknown category 'colour'"):
        ShapesRewards(categories=["colour"])
    with pytest.raises(DataError, match="pairs must be 1 or more"):
        ShapesRewards(pairs=0)


# --- the command ------------------------------------------------------------------------------


def command(*words: str) -> int:
    return cli.main(["evaluate-reward", *words])


def test_the_command_ranks_and_writes(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--reward", "shapes_strict", "{reward: sharpness, label: edges}", "--quiet",
             "-o", "pairs=2", "-o", "generated=0", "--out", str(out)]  # fmt: skip
    assert command(*words) == 0
    said = capsys.readouterr().out
    assert said.index("shapes_strict") < said.index("edges")
    assert "mean over differences" in said and "swapped" in said and str(out) in said
    data = json.loads((out / "result.json").read_text())
    assert [row["label"] for row in data["rows"]] == ["shapes_strict", "edges"]
    assert data["provenance"]["options"]["pairs"] == 2
    assert (out / "report.html").is_file() and (out / "report.md").is_file()


def test_the_command_says_what_is_wrong(capsys):
    assert command("--reward", "sharpness", "-o", "pair=2") == 2
    assert "Did you mean 'pairs'" in capsys.readouterr().err
    assert command("--reward", "sharpness", "--benchmark", "hpd") == 2
    assert "Did you mean 'hpdv2'" in capsys.readouterr().err
    assert command("--reward", "sharpness", "--benchmark", "hpdv2") == 2
    assert "no data was given" in capsys.readouterr().err
    assert command("--reward", "dino_i") == 2
    assert "needs context['reference']" in capsys.readouterr().err


def test_rewards_are_named_as_everywhere():
    found = rewards_of(["quick", "a + 0.5*b", "{reward: vqascore, checkpoint: x}"])
    assert found["shapes_clip"] == "shapes_clip" and found["a + 0.5*b"] == "a + 0.5*b"
    assert found["{reward: vqascore, checkpoint: x}"] == {"reward": "vqascore", "checkpoint": "x"}
    with pytest.raises(CommandError, match="given twice"):
        rewards_of(["quick", "sharpness"])


def test_every_reward_benchmark_loads():
    names = [entry.name for entry in REWARD_BENCHMARKS]
    assert len(names) == 13
    for name in names:
        assert REWARD_BENCHMARKS.load(name).name == name
    with pytest.raises(UnknownNameError):
        REWARD_BENCHMARKS.load("pickapic2")
