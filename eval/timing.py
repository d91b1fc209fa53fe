"""Benchmarks that measure the generator itself, not its pictures: speed, latency, memory.

Such a benchmark has ``time_policy(policy, ...)`` and is run by it in place of the harness' own
making and judging. Its result is an evaluation like any other: settings, provenance, intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.provenance import denoiser_digest, device_name, provenance, weights_dtype
from eval.result import EvalResult, Row, summarise
from eval.workers import Workers
from mmalign.protocols import Policy
from mmalign.runtime.settings import agree
from mmalign.runtime.versions import environment


@dataclass(frozen=True)
class Timed:
    """What was measured: one value a round, higher is better, and numbers by name.

    ``round`` is what a round does, in words; ``seconds`` and ``nfe`` are what measuring took,
    warm-up included.
    """

    values: tuple[float, ...]
    numbers: Mapping[str, float | None]
    task: str
    round: str
    seconds: float = 0.0
    nfe: float = 0.0


def measures_policies(benchmark: Any) -> bool:
    """Whether a benchmark measures the generator itself."""
    return callable(getattr(benchmark, "time_policy", None))


def refuse_pictures(benchmark: Any, options: Mapping[str, Any]) -> None:
    """Refuse options about pictures where the generator itself is measured.

    Raises:
        ValueError: any of them is set.
    """
    given = [name for name, value in options.items() if value]
    if measures_policies(benchmark) and given:
        raise ValueError(
            f"{benchmark.name} measures the generator, not pictures: {', '.join(given)} cannot be "
            "used with it"
        )


def time_policy(
    policy: Policy,
    benchmark: Any,
    out: Path | str | None,
    *,
    workers: Workers | None = None,
    label: str = "",
    batch_size: int,
    **dials: Any,
) -> EvalResult:
    """Measure ``policy`` and return an evaluation, kept in ``out``; measured anew each time.

    Raises:
        ValueError: several processes, which would measure each other.
        SettingsMismatchError: ``out`` holds an evaluation made with other settings.
    """
    if workers is not None and workers.count > 1:
        raise ValueError(f"{benchmark.name} measures one process; start it without a launcher")
    hardware = _hardware(policy.device)
    settings = _settings(policy, benchmark, hardware, batch_size, dials)
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        agree(folder, settings, "an evaluation")
    found: Timed = benchmark.time_policy(policy, batch_size=batch_size, **dials)
    rows = tuple(
        # Rounds are units of their own, so that two results can be compared round by round.
        Row(key=f"round-{k:03d}", prompt=f"round {k}: {found.round}", task=found.task, sample=0,
            seed=0, value=value, valid=True)
        for k, value in enumerate(found.values, 1)
    )  # fmt: skip
    tasks, overall = summarise(rows)
    result = EvalResult(
        benchmark=benchmark.name,
        version=benchmark.version,
        label=label,
        policy=policy.name,
        settings=settings,
        rows=rows,
        tasks=tasks,
        overall=overall,
        provenance=provenance(policy, _clock(hardware))
        | {"hardware": hardware, "environment": environment()},
        seconds=found.seconds,
        nfe=found.nfe,
        numbers=dict(found.numbers),
        unit="score",
        available=len(rows),
        folder=folder,
    )
    if folder is not None:
        result.save(folder / "result.json")
    return result


def _hardware(device: torch.device) -> dict[str, Any]:
    """What the clock ran on; numbers of other hardware are other numbers."""
    told: dict[str, Any] = {"device": device_name(device), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        told["memory_gb"] = round(memory / 1e9, 1)
    return told


def _settings(
    policy: Policy,
    benchmark: Any,
    hardware: Mapping[str, Any],
    batch_size: int,
    dials: Mapping[str, Any],
) -> dict[str, Any]:
    sampler, dtype = policy.sampler, dials.get("dtype")
    steps, scale = dials.get("steps"), dials.get("guidance_scale")
    return {
        "benchmark": benchmark.name,
        "version": benchmark.version,
        "options": {**benchmark.options, "batch_size": batch_size},
        "scorer": _clock(hardware).identity,
        "policy": policy.name,
        "weights": getattr(policy, "identity", None),
        "denoiser": denoiser_digest(policy),
        "steps": sampler.steps if steps is None else steps,
        "guidance_scale": sampler.guidance_scale if scale is None else scale,
        "height": sampler.height,
        "width": sampler.width,
        "dtype": weights_dtype(policy),
        "autocast": None if dtype is None else str(dtype).removeprefix("torch."),
        "device": policy.device.type,
    }


@dataclass(frozen=True)
class _Clock:
    """The judge of a measurement, as provenance names judges."""

    identity: str


def _clock(hardware: Mapping[str, Any]) -> Any:
    said = ", ".join(f"{value} {name}" for name, value in hardware.items() if name != "device")
    return _Clock(f"clock on {hardware['device']} ({said})")
