"""The shipped recipes make a step on the shipped generator; one is judged in one step."""

from __future__ import annotations

import json

import pytest

from mmalign import api
from trainers import entry

SMALL = ["steps=1", "prompts_per_step=1", "images_per_prompt=2", "rollout.batch_size=2"]


@pytest.mark.parametrize("name", ["shapes_dmd", "shapes_rg_lcd", "shapes_r0"])
def test_the_recipe_makes_a_step(tmp_path, name):
    config = entry.resolve_recipe(name, [*SMALL, f"output_dir={tmp_path}"])
    metrics = entry.build(config, tmp_path).train_step()
    assert metrics["grad_norm"] > 0 and metrics["updates/skipped"] == 0


def test_one_step_is_trained_and_judged_by_the_verifier(tmp_path):
    changes = ["objective.windows=1", "evaluation.steps=1", "evaluation.prompts_per_task=1"]
    changes += ["evaluation.samples_per_prompt=1", "rollout.steps=2", "forward.draws=1"]
    api.train("shapes_lcd", [*SMALL, *changes], output_dir=tmp_path)
    result = json.loads((tmp_path / "eval" / "after" / "result.json").read_text())
    assert result["settings"]["steps"] == 1 and result["nfe"] == 6
    said = json.loads((tmp_path / "pipeline" / "sampler.json").read_text())
    assert (said["steps"], said["guidance_scale"], said["renoise"]) == (1, 1.0, True)
