"""The verbs as Python functions, on rendered scenes and the tiny pipeline."""

from __future__ import annotations

import json
import random

import pytest
import torch
from PIL import Image

import mmalign
from mmalign import api
from mmalign.config import ConfigError
from mmalign.policies.build import tiny_pipeline
from mmalign.registry import UnknownNameError
from mmalign.shapes import parse, render, sample_scene
from mmalign.steering import BestOfN
from mmalign.types import Media

PROMPTS = ["a photo of a red star", "a photo of three blue circles", "a photo of a cross"]


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    """One right picture for each prompt, in two sizes."""
    rng = random.Random(0)
    drawn = [sample_scene(parse(p), rng) for p in PROMPTS]
    return [render(s, size) for s, size in zip(drawn, (64, 96, 64), strict=True)]


@pytest.fixture
def folder(scenes, tmp_path):
    for i, scene in enumerate(scenes):
        scene.save(tmp_path / f"{i}.png")
    return tmp_path


# --- score --------------------------------------------------------------------------------------


def test_score_files_folders_and_images(scenes, folder):
    files = [folder / f"{i}.png" for i in range(3)]
    for pictures in (files, [str(f) for f in files], folder, str(folder), scenes):
        for size in (1, 32):
            score = mmalign.score(pictures, PROMPTS, "shapes_strict", batch_size=size)
            assert score.value.tolist() == [1.0, 1.0, 1.0] and score.valid.all()
    wrong = mmalign.score(files, [*PROMPTS[1:], PROMPTS[0]], "shapes_strict")
    assert wrong.value.tolist() == [0.0, 0.0, 0.0]
    assert wrong.notes and "shapes_strict" in wrong.identity


def test_scores_keep_the_order_of_pictures_of_different_sizes(scenes):
    widths = mmalign.score(scenes, PROMPTS, width)
    assert widths.value.tolist() == [64.0, 96.0, 64.0]
    compound = mmalign.score(scenes, PROMPTS, {"shapes_strict": 1.0, "shapes_partial": 0.5})
    assert set(compound.parts) >= {"shapes_strict", "shapes_partial"}
    assert compound.value[1] > 1.4


def width(images, prompts, context=None):
    """Width in pixels, or what the context says."""
    if context is not None:
        return [c["width"] for c in context]
    return [image.width for image in images]


def test_score_tensors_and_one_prompt_for_all(scenes):
    media = Media.from_pil([scenes[0], scenes[0]])
    for pictures in (media, media.data):
        score = mmalign.score(pictures, PROMPTS[0], "shapes_strict", batch_size=1)
        assert score.value.tolist() == [1.0, 1.0]
    assert mmalign.score(scenes[0], PROMPTS[0], "shapes_partial").value[0] > 0.9


def test_score_with_context(scenes):
    facts = [{"width": i} for i in range(3)]
    assert mmalign.score(scenes, PROMPTS, width, context=facts).value.tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="2 contexts for 3 pictures"):
        mmalign.score(scenes, PROMPTS, width, context=facts[:2])


def test_a_reward_that_raises_leaves_its_batch_unscored(scenes):
    def fussy(images, prompts):
        if images[0].width == 96:
            raise RuntimeError("too wide")
        return [1.0] * len(images)

    score = mmalign.score(scenes, PROMPTS, fussy)
    assert score.valid.tolist() == [True, False, True]
    assert score.notes[1] == "RuntimeError: too wide"


def test_bad_scoring_calls_are_explained(scenes, folder):
    with pytest.raises(ValueError, match="2 prompts for 3 pictures"):
        mmalign.score(scenes, PROMPTS[:2], "shapes_strict")
    with pytest.raises(ValueError, match="give prompts"):
        mmalign.score(scenes, None, "shapes_strict")
    with pytest.raises(ValueError, match="the list is empty"):
        mmalign.score([], None, "jpeg_compressibility")
    with pytest.raises(ValueError, match="a path or a Pillow image, got a Tensor"):
        mmalign.score([torch.zeros(3, 8, 8)], None, "jpeg_compressibility")
    with pytest.raises(UnknownNameError, match="Did you mean 'shapes_strict'"):
        mmalign.score(scenes, PROMPTS, "shapes_strikt")
    with pytest.raises(FileNotFoundError, match=r"no picture or folder .*absent\.png"):
        mmalign.score(folder / "absent.png", None, "jpeg_compressibility")


def test_a_file_that_is_no_picture_is_unscored(folder):
    (folder / "broken.png").write_text("not a picture")
    score = mmalign.score(folder, None, "jpeg_compressibility", batch_size=2)
    assert score.valid.tolist() == [True, True, True, False]  # natural order: 0, 1, 2, broken
    assert "broken.png: not a picture" in score.notes[3] and torch.isnan(score.value[3])


# --- evaluate -----------------------------------------------------------------------------------

QUICK = {"steps": 2, "limit": 6, "progress": False, "device": "cpu"}


def test_evaluate(tiny_policy, tmp_path):
    result = mmalign.evaluate(tiny_policy, out=tmp_path / "out", label="before", **QUICK)
    assert len(result.rows) == 6 and len(result.tasks) == 6 and result.policy == "tiny"
    assert result.settings["autocast"] is None and result.settings["steps"] == 2
    assert (tmp_path / "out" / "result.json").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Evaluation report" in page
    again = mmalign.evaluate(tiny_policy, out=tmp_path / "out", report=False, **QUICK)
    assert again.rows == result.rows and again.nfe == result.nfe
    other = api.report(tmp_path / "out", out=tmp_path / "other.html")
    assert other == tmp_path / "other.html" and "Evaluation report" in other.read_text()


def test_precision_is_part_of_an_evaluation(tiny_policy, tmp_path):
    half = mmalign.evaluate(tiny_policy, out=tmp_path, dtype="bf16", report=False, **QUICK)
    assert half.settings["autocast"] == "bfloat16"
    with pytest.raises(ValueError, match="autocast: 'bfloat16' there, None now"):
        mmalign.evaluate(tiny_policy, out=tmp_path, dtype="fp32", **QUICK)


def test_evaluate_a_pipeline_object_and_a_name():
    pipeline = tiny_pipeline()
    quick = {**QUICK, "limit": 2}
    one = mmalign.evaluate(pipeline, **quick)
    two = mmalign.evaluate("tiny-sd3", "shapes", samples_per_prompt=1, **quick)
    assert one.settings["denoiser"] == two.settings["denoiser"]
    assert one.folder is None and two.policy == "tiny-sd3"
    assert two.settings["options"]["samples_per_prompt"] == 1


def test_bad_evaluations_are_explained(tiny_policy):
    with pytest.raises(UnknownNameError, match="unknown benchmark 'shape'"):
        mmalign.evaluate(tiny_policy, "shape")
    with pytest.raises(UnknownNameError, match="Did you mean 'shapes-flow'"):
        mmalign.evaluate("shapes-flw")
    with pytest.raises(UnknownNameError, match="unknown precision 'bf8'"):
        mmalign.evaluate(tiny_policy, dtype="bf8")
    with pytest.raises(ValueError, match="before making a policy of it"):
        mmalign.evaluate(tiny_policy, lora="adapter")
    with pytest.raises(ValueError, match="set them there"):
        mmalign.evaluate(tiny_policy, object(), samples_per_prompt=2)


# --- steer --------------------------------------------------------------------------------------


def test_steer(tiny_policy):
    reward = {"jpeg_compressibility": 1.0}
    result = mmalign.steer(tiny_policy, PROMPTS[0], reward, n=2, steps=2, seed=3)
    assert len(result.media) == 1 and len(result.candidates) == 2
    again = mmalign.steer(
        tiny_policy, PROMPTS[:1], "jpeg_compressibility", BestOfN(n=2, steps=2, seed=3)
    )
    assert again.chosen == result.chosen and again.media.data.equal(result.media.data)


def test_a_reward_that_raises_ends_steering_with_its_reason(tiny_policy):
    def broken(images, prompts):
        raise RuntimeError("no weights")

    with pytest.raises(ValueError, match="RuntimeError: no weights"):
        mmalign.steer(tiny_policy, PROMPTS[:1], broken, n=2, steps=1)


def test_bad_steering_calls_are_explained(tiny_policy):
    with pytest.raises(UnknownNameError, match="Did you mean 'best_of_n'"):
        mmalign.steer(tiny_policy, PROMPTS, "shapes_partial", "best_of")
    with pytest.raises(UnknownNameError, match="Did you mean 'batch_size'"):
        mmalign.steer(tiny_policy, PROMPTS, "shapes_partial", batchsize=2)
    with pytest.raises(ValueError, match="n, seed: set it in the method object"):
        mmalign.steer(tiny_policy, PROMPTS, "shapes_partial", BestOfN(), seed=1, n=2)


# --- the rest -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "module", "function"),
    [
        ("shapes-vae", "autoencoder", "train_autoencoder"),
        ("shapes-flow", "generator", "train_generator"),
        ("shapes-sd", "diffusion", "train_diffusion"),
        ("shapes-clip", "clip", "train_clip"),
        ("shapes-aesthetic", "aesthetic", "train_aesthetic"),
        ("shapes-artifact", "artifact", "train_artifact"),
    ],
)
def test_pretrain(monkeypatch, what, module, function):
    monkeypatch.setattr(f"trainers.pretrain.{module}.{function}", lambda config: config)
    config = api.pretrain(what, ["steps=7", "seed=2"], output_dir="here")
    assert (config.steps, config.seed, config.out) == (7, 2, "here")
    with pytest.raises(ConfigError, match="Did you mean 'steps'"):
        api.pretrain(what, ["step=7"])
    with pytest.raises(UnknownNameError, match="Did you mean 'shapes-flow'"):
        api.pretrain("shapes-flo")


def test_report_of_a_training_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/mean": 0.5}) + "\n")
    assert api.report(tmp_path) == tmp_path / "report.html"
    assert "Training report" in (tmp_path / "report.html").read_text()
    with pytest.raises(FileNotFoundError, match="is not the output folder"):
        api.report(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither a training run"):
        api.report(tmp_path / "empty")


# --- train --------------------------------------------------------------------------------------


def test_train_puts_the_parts_together(monkeypatch, tiny_policy, tmp_path):
    """Preflight first, a benchmark for the trainer to call, a report at the end."""
    from trainers import entry
    from trainers.preflight import Check, PreflightError, Report

    checks = [Report((Check("ratio", True, "1"),)), Report((Check("spread", False, "constant"),))]
    monkeypatch.setattr(entry, "run_preflight", lambda config, reward: checks.pop(0))

    def run(config, *, evaluate, resume, reward):
        folder = tmp_path / "run"
        evaluate(tiny_policy, config, folder / "eval" / "before", "before")
        assert config.output_dir == str(folder) and resume and reward is width
        return folder

    monkeypatch.setattr(entry, "train", run)
    recipe = {"policy": "tiny-sd3", "evaluation": {"steps": 1, "samples_per_prompt": 1}}
    options = {"output_dir": tmp_path / "run", "reward": width}
    folder = mmalign.train(recipe, ["evaluation.prompts_per_task=1"], **options)
    found = json.loads((folder / "eval" / "before" / "result.json").read_text())
    assert found["label"] == "before" and len(found["rows"]) == 6
    assert "Training report" in (folder / "report.html").read_text()
    with pytest.raises(PreflightError, match="spread: constant"):
        mmalign.train(recipe, **options)
