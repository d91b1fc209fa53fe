"""How fast an evaluation is end to end: pictures generated, judged and written, a second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from eval.benchmarks.load import load_benchmark
from eval.harness import run_benchmark
from eval.provenance import device_name, versions, weights_dtype
from mmalign.policies.load import policy_on
from mmalign.protocols import Policy
from mmalign.runtime.device import pick_dtype
from mmalign.runtime.files import atomic_write_json
from mmalign.sampling import generate
from mmalign.types import Media


def bench_evaluation(
    policy: Any,
    benchmark: Any = "shapes",
    *,
    images: int = 64,
    batch_size: int = 32,
    steps: int | None = None,
    guidance_scale: float | None = None,
    repeats: int = 3,
    pin: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Time ``repeats`` evaluations of ``images`` pictures into a folder that is thrown away.

    Returns:
        ``settings``; ``images_per_second`` with ``median``, ``min`` and ``max``; and
        ``generating``, the share of the time in which the generator worked: what is missing to 1 is
        what judging and writing did not hide behind it.

    Raises:
        ValueError: a size below 1.
    """
    if min(images, batch_size, repeats) < 1:
        raise ValueError(
            f"images {images}, batch_size {batch_size} and repeats {repeats} must be 1 or more"
        )
    loaded = policy_on(policy, device)
    asked = load_benchmark(benchmark)
    chosen = None if dtype is None else pick_dtype(dtype, loaded.device)
    dials: dict[str, Any] = {
        "steps": steps, "guidance_scale": guidance_scale, "pin": pin, "dtype": chosen,
        "batch_size": batch_size,
    }  # fmt: skip
    _once(loaded, asked, min(images, batch_size), dials)  # warms up, and loads the judge
    runs = [_once(loaded, asked, images, dials) for _ in range(repeats)]
    rates = [run[0] for run in runs]
    found = {
        "policy": loaded.name,
        "benchmark": asked.name,
        "settings": {
            **dials, "images": images, "repeats": repeats, "dtype": dtype or weights_dtype(loaded),
            "steps": steps or loaded.sampler.steps, "device": device_name(loaded.device),
            "threads": torch.get_num_threads(), "size": loaded.sampler.width,
        },
        "images_per_second": {"median": median(rates), "min": min(rates), "max": max(rates)},
        "generating": median(run[1] for run in runs),
        "versions": versions(),
    }  # fmt: skip
    if out is not None:
        atomic_write_json(out, found)
    return found


@dataclass
class Timed:
    """The sampler, the time spent in it, and the pictures that it made."""

    seconds: float = field(default=0.0)
    pictures: int = field(default=0)

    def __call__(
        self, policy: Policy, prompts: Sequence[str], seeds: Sequence[int], **options: Any
    ) -> tuple[Media, int]:
        start = time.perf_counter()
        media, nfe = generate(policy, prompts, seeds, **options)
        media = Media(media.data.cpu())  # a GPU has finished only when its pictures are here
        self.seconds += time.perf_counter() - start
        self.pictures += len(prompts)
        return media, nfe


def _once(
    policy: Policy, benchmark: Any, images: int, dials: dict[str, Any]
) -> tuple[float, float]:
    """Pictures a second, and the share of the time spent generating."""
    timed = Timed()
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = run_benchmark(
            policy, benchmark, folder, limit=images, progress=False, generate=timed, **dials
        )
        seconds = time.perf_counter() - start
    return len(result.rows) / seconds, timed.seconds / seconds
