"""Runs a generator, or a folder of pictures, through a benchmark.

Seeds belong to (prompt, sample), runs are resumable picture by picture and shared among processes,
and results carry intervals and provenance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eval.clips import check_kind, wanted_kind
from eval.completion import Run
from eval.judging import unscored
from eval.layouts import Found, LayoutError, layout_of
from eval.making import Existing, Generate, Generated
from eval.provenance import denoiser_digest, judging, provenance, versions, weights_dtype
from eval.result import EvalResult, Row, summarise
from eval.sets import check_kept, kept_cells, with_set
from eval.store import Sample, SettingsMismatchError, Store, check_keys
from eval.timing import measures_policies, time_policy
from eval.trust import GapError, refuse_gaps, repeated, training_facts
from eval.workers import Workers
from mmalign.protocols import Benchmark, Policy, Request
from mmalign.runtime.training_record import TrainingRecord

SEED_RULE = "set by the benchmark for each (prompt, sample)"
CPU_PIN = 8  # pictures of a network call where equal bits are wanted


def run_benchmark(
    policy: Policy,
    benchmark: Benchmark,
    out: Path | str | None = None,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    save_images: bool = True,
    label: str = "",
    generate: Generate | None = None,
    pin: int | None = None,
    swap: bool = False,
    strict: bool = False,
    workers: Workers | None = None,
    training: TrainingRecord | None = None,
) -> EvalResult:
    """Generate every picture a benchmark asks for, judge it, and summarise with intervals.

    Pictures are judged as the 8-bit files that are kept, never as floats.  With ``out`` the run is
    resumable: pictures whose digest still matches are neither generated nor judged again, and
    ``result.json`` is written there at the end.

    Args:
        policy: the generator.
        benchmark: what to ask for and how to judge it.
        out: folder for pictures, scores and ``result.json``; ``None`` keeps nothing on disk.
        steps, guidance_scale: ``None`` takes the policy's own sampler settings.
        batch_size: pictures generated together; does not change what is asked for.
        limit: only the first requests, balanced over tasks by the benchmark.
        dtype: autocast precision; ``None`` leaves the weights' own.
        progress: show progress with time left on standard error.
        save_images: keep the pictures in ``out/images``.
        label: free text for reports, such as ``before``.
        generate: sampling function; the benchmark's own or :func:`mmalign.sampling.generate` unless
            given. It is handed ``dtype`` only where that is not ``None``.
        pin: pictures of every network call, the last one filled up: pictures then have the same
            bits in any batch size and number of processes (on one kind of CPU). ``batch_size`` is
            rounded up to a multiple.
        swap: generate everything before anything is judged, and move the generator off its device
            in between, for models that do not fit beside each other.
        strict: raise where a picture is unscored or anything is odd, after all is kept.
        workers: the processes that share the work; see :func:`eval.workers.join`.
        training: what the model was trained on.

    Raises:
        SettingsMismatchError: ``out`` holds an evaluation made with other settings.
        GapError: under ``strict``.
        ValueError: ``batch_size`` below 1, keys that repeat or cannot be file names, ``swap``
            without pictures that are kept, or a policy that the benchmark cannot measure.
    """
    if batch_size < 1 or (pin is not None and pin < 1):
        raise ValueError(f"batch_size must be 1 or more, got {batch_size} (pin: {pin})")
    if swap and (out is None or not save_images):
        raise ValueError("swap judges pictures from their files: give out, and keep the pictures")
    if measures_policies(benchmark):
        return time_policy(
            policy, benchmark, out, steps=steps, guidance_scale=guidance_scale, dtype=dtype,
            batch_size=batch_size, workers=workers, label=label, progress=progress,
        )  # fmt: skip
    check_kind(policy, benchmark)
    if hasattr(benchmark, "check_policy"):
        benchmark.check_policy(policy)
    check_kept(benchmark, out is not None and save_images)
    requests = benchmark.requests(limit)
    check_keys(requests)
    dtype = None if dtype == torch.float32 else dtype
    settings = _settings(policy, benchmark, steps, guidance_scale, dtype)
    if pin is not None:
        settings["pin"] = pin
        batch_size = -(-batch_size // pin) * pin
    workers = workers or Workers()
    store = Store(None if out is None else Path(out), settings, save_images, workers=workers)
    sampling = generate or getattr(benchmark, "generate", None) or _default_generate()
    source = Generated(policy, sampling, settings, dtype, pin, wanted_kind(benchmark))
    title = f"{benchmark.name} {label}".strip() if progress and workers.main else None
    run = Run(store, benchmark, source, batch_size, title)
    samples = run.complete(requests, _away(policy) if swap else None)
    result = _result(benchmark, requests, samples, settings, training)
    result = replace(
        result,
        label=label,
        policy=policy.name,
        provenance=provenance(policy, benchmark) | {"processes": workers.count},
        available=_available(benchmark, limit, requests),
    )
    result = with_set(result, benchmark, kept_cells(result.rows, store.folder), workers)
    return _finished(result, store, strict)


def judge_folder(
    images: Path | str,
    benchmark: Benchmark,
    out: Path | str | None = None,
    *,
    layout: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    progress: bool = True,
    label: str = "",
    strict: bool = False,
    workers: Workers | None = None,
    training: TrainingRecord | None = None,
) -> EvalResult:
    """Judge pictures that are there already, in an official folder layout.

    Pictures are judged as they are, never resized, and neither copied nor changed. What is missing
    or cannot be read is unscored, with the reason.

    Args:
        images: the folder.
        layout: a name in :data:`eval.layouts.LAYOUTS`; the benchmark's own by default, else flat.
        batch_size, limit, progress, label, strict, workers, training, out: as for
            :func:`run_benchmark`.

    Raises:
        LayoutError: the folder is not in the layout.
        SettingsMismatchError: ``out`` holds another evaluation.
        GapError: under ``strict``; before anything is judged where a picture is missing.
    """
    folder = Path(images)
    chosen = layout_of(layout or getattr(benchmark, "layout", None) or "flat")
    requests = benchmark.requests(limit)
    check_keys(requests)
    # All of them: with a limit the other pictures are no strangers.
    found = chosen.read(folder, requests if limit is None else benchmark.requests(None))
    found = Found({r.key: found.cells[r.key] for r in requests if r.key in found.cells},
                  found.problems)  # fmt: skip
    lacking = [r for r in requests if r.key not in found.cells]
    if len(lacking) == len(requests):
        odd = "; ".join(found.problems) or "it holds pictures of other requests"
        raise LayoutError(
            f"{folder} holds not one of the {len(requests)} pictures of {benchmark.name} (layout "
            f"{chosen.name!r}): {odd}. Name the layout that the folder is in (--layout), or the "
            "data that its prompts are from (--data)"
        )
    if strict and lacking:
        raise GapError(
            f"{len(lacking)} of {len(requests)} pictures of {benchmark.name} are missing in "
            f"{folder} (layout {chosen.name!r}), the first is {lacking[0].key!r}: "
            f"{lacking[0].prompt!r}; make them, name another --layout, or judge what is there "
            "without --strict"
        )
    settings = _folder_settings(folder, chosen.name, found, benchmark)
    workers = workers or Workers()
    files = {k: c.path for k, c in found.cells.items() if c.part is None}
    store = Store(None if out is None else Path(out), settings, files=files, workers=workers)
    title = f"{benchmark.name} {label}".strip() if progress and workers.main else None
    run = Run(store, benchmark, Existing(found.cells, wanted_kind(benchmark)), batch_size, title)
    there = [r for r in requests if r.key in found.cells]
    kept = {s.row.key: s for s in run.complete(there)}
    reason = f"missing in {folder} (layout {chosen.name})"
    lost = {r.key: Sample(unscored(r, reason), None, 0.0, 0.0) for r in lacking}
    samples = [(kept | lost)[r.key] for r in requests]
    result = _result(benchmark, requests, samples, settings, training)
    result = replace(
        result,
        label=label,
        policy=label or folder.resolve().name,
        provenance=judging(benchmark) | {"images": str(folder.resolve())},
        problems=(*result.problems, *found.problems),
        available=_available(benchmark, limit, requests),
    )
    result = with_set(result, benchmark, found.cells, workers)
    return _finished(result, store, strict)


def _result(
    benchmark: Benchmark,
    requests: Sequence[Request],
    samples: Sequence[Sample],
    settings: dict[str, Any],
    training: TrainingRecord | None,
) -> EvalResult:
    rows = tuple(s.row for s in samples)
    tasks, overall = summarise(rows)
    compute = getattr(benchmark, "numbers", None)
    return EvalResult(
        benchmark=benchmark.name,
        version=benchmark.version,
        label="",
        policy="",
        settings=settings,
        rows=rows,
        numbers={} if compute is None else dict(compute(rows)),
        tasks=tasks,
        overall=overall,
        seconds=sum(s.seconds for s in samples),
        nfe=round(sum(s.nfe for s in samples), 6),
        unit=getattr(benchmark, "unit", None) or _unit(rows),
        problems=(*getattr(benchmark, "problems", ()), *repeated(requests)),
        training=training_facts(training, benchmark, rows),
    )


def _unit(rows: Sequence[Row]) -> str:
    """Of a benchmark that does not say: shares lie in [0, 1]."""
    return "share" if all(0 <= r.value <= 1 for r in rows if r.value is not None) else "score"


def _finished(result: EvalResult, store: Store, strict: bool) -> EvalResult:
    """Written by the first process; under ``strict`` whole, or an error."""
    result = replace(result, folder=store.folder)
    if store.folder is not None and store.workers.main:
        result.save(store.folder / "result.json")
    if strict:
        refuse_gaps(result)
    return result


def _available(benchmark: Benchmark, limit: int | None, requests: Sequence[Request]) -> int:
    return len(requests) if limit is None else len(benchmark.requests(None))


@contextmanager
def _away(policy: Policy) -> Iterator[None]:
    """The generator's weights in main memory while judges need its device."""
    pipeline, device = getattr(policy, "pipeline", None), policy.device
    if pipeline is None or device.type == "cpu":
        yield
        return
    pipeline.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        pipeline.to(device)


def _settings(
    policy: Policy,
    benchmark: Benchmark,
    steps: int | None,
    guidance_scale: float | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Everything that changes a picture or its score; two runs that differ here never mix."""
    sampler = policy.sampler
    return {
        **_judged_by(benchmark),
        "policy": policy.name,
        "weights": getattr(policy, "identity", None),
        "denoiser": denoiser_digest(policy),
        "steps": sampler.steps if steps is None else steps,
        "guidance_scale": sampler.guidance_scale if guidance_scale is None else guidance_scale,
        "height": sampler.height,
        "width": sampler.width,
        **({"renoise": True} if sampler.renoise else {}),
        **({} if sampler.spacing == "stock" else {"spacing": sampler.spacing}),
        "seed_rule": getattr(benchmark, "seed_rule", SEED_RULE),
        "dtype": weights_dtype(policy),
        "autocast": None if dtype is None else str(dtype).removeprefix("torch."),
        "device": policy.device.type,
        "libraries": {k: versions()[k] for k in ("torch", "diffusers")},
    }


def _judged_by(benchmark: Benchmark) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name,
        "version": benchmark.version,
        "options": getattr(benchmark, "options", {}),
        "scorer": getattr(benchmark, "identity", None),
    }


def _folder_settings(
    folder: Path, layout: str, found: Found, benchmark: Benchmark
) -> dict[str, Any]:
    settings = {**_judged_by(benchmark), "images": str(folder.resolve()), "layout": layout}
    grids = sorted({c.path for c in found.cells.values() if c.part is not None})
    if grids:  # their cells are kept as files, whose digests would not see the grid change
        digest = hashlib.sha256()
        for path in grids:
            digest.update(f"{path.name} ".encode() + path.read_bytes())
        settings["grids"] = digest.hexdigest()[:16]
    return settings


def _default_generate() -> Generate:
    from mmalign.sampling import generate

    return generate


__all__ = [
    "CPU_PIN",
    "EvalResult",
    "GapError",
    "Generate",
    "SettingsMismatchError",
    "judge_folder",
    "run_benchmark",
]
