"""Runs a generator through a benchmark: pinned seeds, resumable, with intervals and provenance."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image

from eval.provenance import denoiser_digest, provenance, versions, weights_dtype
from eval.result import EvalResult, Row, finite, summarise
from eval.store import Sample, SettingsMismatchError, Store, check_keys
from mmalign.protocols import Benchmark, Policy, Request
from mmalign.runtime.progress import track
from mmalign.types import Media, Score

SEED_RULE = "set by the benchmark for each (prompt, sample)"


class Generate(Protocol):
    """Deterministic sampling: media of ``B`` prompts and the network evaluations spent."""

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Media, int]: ...


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
        generate: sampling function; :func:`mmalign.sampling.generate` unless given. It is handed
            ``dtype`` only where that is not ``None``.

    Raises:
        SettingsMismatchError: ``out`` holds an evaluation made with other settings.
        ValueError: ``batch_size`` below 1, or keys that repeat or cannot be file names.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    requests = benchmark.requests(limit)
    check_keys(requests)
    dtype = None if dtype == torch.float32 else dtype
    settings = _settings(policy, benchmark, steps, guidance_scale, dtype)
    store = Store(None if out is None else Path(out), settings, save_images)
    run = _Run(policy, benchmark, generate or _default_generate(), settings, dtype)
    title = f"{benchmark.name} {label}".strip() if progress else None
    samples = _complete(store, run, requests, batch_size, title)
    tasks, overall = summarise([s.row for s in samples])
    result = EvalResult(
        benchmark=benchmark.name,
        version=benchmark.version,
        label=label,
        policy=policy.name,
        settings=settings,
        rows=tuple(s.row for s in samples),
        tasks=tasks,
        overall=overall,
        provenance=provenance(policy, benchmark),
        seconds=sum(s.seconds for s in samples),
        nfe=round(sum(s.nfe for s in samples), 6),
        folder=store.folder,
    )
    if store.folder is not None:
        result.save(store.folder / "result.json")
    return result


def _complete(
    store: Store, run: _Run, requests: Sequence[Request], batch_size: int, title: str | None
) -> list[Sample]:
    """Generate and judge what ``store`` lacks; the samples of all ``requests``, in their order."""
    samples = store.finished(requests)
    todo = [r for r in requests if r.key not in samples]
    with track(title or "", len(requests), len(samples), enabled=title is not None) as advance:
        for batch in _batches(todo, batch_size):
            start = time.monotonic()
            images, score, nfe = run(batch)
            rows = [_row(r, score, i, store.image_name(r.key)) for i, r in enumerate(batch)]
            made = store.add(rows, images, time.monotonic() - start, nfe)
            samples.update({s.row.key: s for s in made})
            advance(len(batch))
    return [samples[r.key] for r in requests]


@dataclass(frozen=True)
class _Run:
    """One batch: generate, round to 8 bits, judge."""

    policy: Policy
    benchmark: Benchmark
    generate: Generate
    settings: dict[str, Any]
    dtype: torch.dtype | None

    @torch.no_grad()
    def __call__(self, batch: Sequence[Request]) -> tuple[list[Image], Score, int]:
        media, nfe = self.generate(
            self.policy,
            [r.prompt for r in batch],
            [r.seed for r in batch],
            steps=self.settings["steps"],
            guidance_scale=self.settings["guidance_scale"],
            **({} if self.dtype is None else {"dtype": self.dtype}),
        )
        if len(media) != len(batch):
            raise ValueError(f"asked for {len(batch)} pictures, generated {len(media)}")
        if media.kind != "image":
            raise ValueError(f"{self.benchmark.name} judges images, the policy made a {media.kind}")
        images = media.to_pil()
        score = self.benchmark.judge(Media.from_pil(images), batch)
        if len(score) != len(batch):
            raise ValueError(f"{self.benchmark.name} judged {len(score)} of {len(batch)} pictures")
        return images, _without_broken(score, media), nfe


def _without_broken(score: Score, media: Media) -> Score:
    """NaN becomes black in an 8-bit file; a judge would take that for a picture."""
    whole = torch.isfinite(media.data).flatten(1).all(1).to(score.valid.device)
    if bool(whole.all()):
        return score
    notes = score.notes or ("",) * len(score)
    said = "the picture holds NaN or infinite values"
    notes = tuple(n if ok else said for n, ok in zip(notes, whole.tolist(), strict=True))
    return replace(score, valid=score.valid & whole, notes=notes)


def _row(request: Request, score: Score, index: int, image: str | None) -> Row:
    valid = bool(score.valid[index])
    partial = score.parts.get("partial")
    return Row(
        key=request.key,
        prompt=request.prompt,
        task=request.task,
        sample=request.sample,
        seed=request.seed,
        value=float(score.value[index]) if valid else None,
        valid=valid,
        note=score.notes[index] if score.notes else "",
        partial=None if partial is None else finite(float(partial[index])),
        image=image,
    )


def _settings(
    policy: Policy,
    benchmark: Benchmark,
    steps: int | None,
    guidance_scale: float | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Everything that changes a picture or its score; two runs that differ here never mix."""
    sampler = policy.sampler
    used = versions()
    return {
        "benchmark": benchmark.name,
        "version": benchmark.version,
        "options": getattr(benchmark, "options", {}),
        "scorer": getattr(benchmark, "identity", None),
        "policy": policy.name,
        "weights": getattr(policy, "identity", None),
        "denoiser": denoiser_digest(policy),
        "steps": sampler.steps if steps is None else steps,
        "guidance_scale": sampler.guidance_scale if guidance_scale is None else guidance_scale,
        "height": sampler.height,
        "width": sampler.width,
        "seed_rule": getattr(benchmark, "seed_rule", SEED_RULE),
        "dtype": weights_dtype(policy),
        "autocast": None if dtype is None else str(dtype).removeprefix("torch."),
        "device": policy.device.type,
        "libraries": {k: used[k] for k in ("torch", "diffusers")},
    }


def _batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def _default_generate() -> Generate:
    from mmalign.sampling import generate

    return generate


__all__ = ["EvalResult", "Generate", "SettingsMismatchError", "run_benchmark"]
