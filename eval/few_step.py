"""A few-step generator against its teacher at equal network evaluations: accuracy and speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.bench import Timed
from eval.benchmarks.load import load_benchmark
from eval.harness import run_benchmark
from eval.provenance import device_name, versions, weights_dtype
from mmalign.policies.load import policy_on
from mmalign.protocols import Policy
from mmalign.runtime.device import pick_dtype
from mmalign.runtime.files import atomic_write_json

EVALUATIONS = (1, 2, 4, 8, 16, 32)


def bench_few_step(
    student: Any,
    teacher: Any = "shapes-flow",
    benchmark: Any = "shapes",
    *,
    evaluations: Sequence[int] = EVALUATIONS,
    images: int | None = None,
    batch_size: int = 32,
    guidance_scale: float | None = None,
    dtype: str | None = None,
    device: str = "auto",
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Run both through a benchmark at each number of network evaluations a picture.

    The student makes as many steps, without guidance; the teacher as many without guidance and, of
    even numbers, half as many with.

    Args:
        images: only the first requests of the benchmark, balanced over tasks.
        guidance_scale: the teacher's; ``None`` takes its recommended one.
        out: a folder for results and pictures, in which a run that was stopped goes on, and for
            ``few_step.json``.

    Returns:
        ``rows``, each with ``generator``, ``evaluations``, ``steps``, ``guidance_scale``,
        ``accuracy`` (``mean``, ``low``, ``high``), ``images_per_second`` (generation alone; null
        where no picture had to be made anew) and ``label``, or with ``refused`` where a sampler has
        no such steps; ``settings`` and ``versions``.

    Raises:
        ValueError: a size below 1.
    """
    if not evaluations or min(*evaluations, batch_size, images or 1) < 1:
        raise ValueError(
            f"evaluations {tuple(evaluations)}, images {images} and batch_size {batch_size} must "
            "be 1 or more"
        )
    pair = {"student": policy_on(student, device), "teacher": policy_on(teacher, device)}
    own = pair["teacher"].sampler.guidance_scale if guidance_scale is None else guidance_scale
    chosen = None if dtype is None else pick_dtype(dtype, pair["teacher"].device)
    dials = {"batch_size": batch_size, "limit": images, "dtype": chosen}
    asked = load_benchmark(benchmark)
    rows = [
        _row(pair[role], asked, out, {**dials, **cell}, role, n)
        for n in evaluations
        for role, cell in _cells(n, own)
    ]
    found = {
        "student": pair["student"].name,
        "teacher": pair["teacher"].name,
        "benchmark": asked.name,
        "rows": rows,
        "settings": {
            "batch_size": batch_size, "images": images, "threads": torch.get_num_threads(),
            "dtype": dtype or weights_dtype(pair["teacher"]),
            "device": device_name(pair["teacher"].device),
        },
        "versions": versions(),
    }  # fmt: skip
    if out is not None:
        atomic_write_json(Path(out) / "few_step.json", found)
    return found


def _cells(evaluations: int, guidance: float) -> list[tuple[str, dict[str, Any]]]:
    """Who samples how, at so many evaluations a picture."""
    plain = {"steps": evaluations, "guidance_scale": 1.0}
    cells = [("student", plain), ("teacher", plain)]
    if guidance > 1 and evaluations % 2 == 0:
        cells.append(("teacher", {"steps": evaluations // 2, "guidance_scale": guidance}))
    return cells


def _row(
    policy: Policy, benchmark: Any, out: str | Path | None, dials: dict[str, Any], role: str,
    evaluations: int,
) -> dict[str, Any]:  # fmt: skip
    steps, scale = dials["steps"], dials["guidance_scale"]
    row = {"generator": role, "evaluations": evaluations, "steps": steps, "guidance_scale": scale}
    row["label"] = f"{role}, {steps} steps" + (f", guidance {scale:g}" if scale > 1 else "")
    try:
        policy.sigmas(steps)
    except ValueError as error:
        return {**row, "refused": str(error)}
    folder = None if out is None else Path(out) / f"{role}_{steps}_{scale:g}"
    _warm_up(policy, benchmark, dials)
    timed = Timed()
    result = run_benchmark(
        policy, benchmark, folder, generate=timed, progress=False, label=row["label"], **dials
    )
    interval = result.overall.accuracy
    made = timed.pictures / timed.seconds if timed.pictures else None
    return {
        **row,
        "accuracy": {"mean": interval.mean, "low": interval.low, "high": interval.high},
        "images_per_second": made,
    }


def _warm_up(policy: Policy, benchmark: Any, dials: dict[str, Any]) -> None:
    """One batch that is not timed: the first call allocates."""
    requests = benchmark.requests(dials["limit"])[: dials["batch_size"]]
    prompts, seeds = [r.prompt for r in requests], [r.seed for r in requests]
    Timed()(
        policy, prompts, seeds, steps=dials["steps"], dtype=dials["dtype"],
        guidance_scale=dials["guidance_scale"],
    )  # fmt: skip


__all__ = ["EVALUATIONS", "bench_few_step"]
