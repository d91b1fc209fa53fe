"""The evaluation of a training run: the trainer calls it and knows nothing of benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.harness import run_benchmark
from mmalign.protocols import Policy
from mmalign.registry import BENCHMARKS
from mmalign.runtime.device import pick_dtype
from mmalign.runtime.training_record import TrainingRecord


def evaluate_in_training(policy: Policy, config: Any, folder: Path, label: str) -> None:
    """Run the benchmark of ``config.evaluation`` (a training configuration) into ``folder``."""
    dials = config.evaluation
    benchmark = BENCHMARKS.load(dials.benchmark)(
        prompts_per_task=dials.prompts_per_task, samples_per_prompt=dials.samples_per_prompt
    )
    run_benchmark(
        policy,
        benchmark,
        folder,
        steps=dials.steps,
        guidance_scale=dials.guidance_scale,
        batch_size=dials.batch_size,
        dtype=pick_dtype(config.model.precision, policy.device),
        label=label,
        # Before the first update nothing has been seen yet.
        training=None if label == "before" else TrainingRecord.near(folder.parents[1]),
    )
