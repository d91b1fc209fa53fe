"""Every shipped recipe is one the configuration loader accepts."""

from __future__ import annotations

import pytest

from mmalign.assets import shipped_recipes
from mmalign.registry import KERNELS, OBJECTIVES
from mmalign.sampling import build_kernel
from trainers.data import minibatches, recorded_steps
from trainers.entry import resolve_recipe, run_hash
from trainers.objective import build_objective, process_of

RECIPES = sorted(shipped_recipes())


def test_there_are_recipes():
    assert {"shapes_flow_grpo", "sd35_medium_flow_grpo"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_resolves(name):
    config = resolve_recipe(name)
    assert config.algorithm in OBJECTIVES and config.rollout.kernel in KERNELS
    process = process_of(build_objective(config.algorithm, dict(config.objective)))
    kernel = build_kernel(config.rollout.kernel, **dict(config.rollout.kernel_options))
    assert kernel.stochastic or process != "reverse"
    recorded, noisy = recorded_steps(config, 0)
    assert recorded and set(recorded) <= set(noisy)
    assert sum(map(len, minibatches(config, 0))) == config.batch
    assert run_hash(config) == run_hash(resolve_recipe(name, ["output_dir=elsewhere"]))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_short_and_says_what_it_is(name):
    lines = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 40
