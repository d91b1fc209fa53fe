"""From names and options to a finished evaluation: what the command and the function both do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.benchmarks.load import load_benchmark
from eval.harness import CPU_PIN, judge_folder, run_benchmark
from eval.layouts import LayoutError, layout_of
from eval.result import EvalResult
from eval.sets import check_kept
from eval.timing import refuse_pictures
from eval.workers import join
from mmalign.policies.load import policy_on
from mmalign.runtime.device import pick_dtype
from mmalign.runtime.tables import check_table_path, write_table
from mmalign.runtime.training_record import TrainingRecord

COLUMNS: Mapping[str, type] = {
    "key": str, "prompt": str, "task": str, "sample": float, "seed": str, "value": float,
    "valid": bool, "note": str, "partial": float, "image": str,
}  # fmt: skip


def evaluate(
    policy: Any,
    benchmark: Any,
    *,
    images: str | Path | None = None,
    layout: str | None = None,
    lora: str | Path | None = None,
    device: str = "auto",
    dtype: Any = None,
    pin: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    swap: bool = False,
    benchmark_options: Mapping[str, Any] | None = None,
    report: bool = True,
    table: str | Path | None = None,
    export: str | Path | None = None,
    **shared: Any,
) -> EvalResult:
    """See :func:`mmalign.api.evaluate`.

    Args:
        benchmark_options: of a benchmark given by name.
        shared: ``out``, ``batch_size``, ``limit``, ``label``, ``progress``, ``strict``.

    Raises:
        ValueError: both or neither of policy and images, or options that do not go together.
    """
    _check(policy, images, shared.get("out"), table, export)
    asked = load_benchmark(benchmark, **(benchmark_options or {}))
    limit = shared.get("limit")
    pictures = {"images": images, "limit": limit, "pin": pin, "swap": swap, "export": export}
    refuse_pictures(asked, pictures)
    if images is None:
        check_kept(asked, shared.get("out") is not None)
    workers = join(device)
    shared["workers"] = workers
    if images is not None:
        sampling = {"steps": steps, "guidance_scale": guidance_scale, "pin": pin, "dtype": dtype}
        _refuse_sampling({**sampling, "swap": swap or None})
        # Beside them, or beside the weights that they are said to come from.
        shared["training"] = TrainingRecord.near(lora, images)
        result = judge_folder(images, asked, layout=layout, **shared)
    else:
        if layout is not None and export is None:
            raise ValueError("layout says how images, or an export, name their pictures")
        where = device if workers.device is None else str(workers.device)
        loaded = policy_on(policy, where, lora)
        pin = CPU_PIN if pin is None and loaded.device.type == "cpu" else pin
        shared["training"] = TrainingRecord.near(lora, policy)
        result = run_benchmark(
            loaded,
            asked,
            steps=steps,
            guidance_scale=guidance_scale,
            dtype=pick_dtype(dtype, loaded.device) if isinstance(dtype, str) else dtype,
            pin=pin or None,
            swap=swap,
            **shared,
        )
    if workers.main:
        _write(result, asked, report, table, export, layout)
    return result


def export_pictures(
    result: EvalResult, benchmark: Any, folder: str | Path, layout: str | None = None
) -> int:
    """Copy a result's pictures into an official layout; returns how many files were written.

    Raises:
        LayoutError: no picture was kept, or the layout cannot name them.
    """
    found = {r.key: p for r in result.rows if (p := result.image_path(r)) is not None}
    if not found:
        raise LayoutError("there are no pictures to export: none were kept (give out)")
    named = layout_of(layout or getattr(benchmark, "layout", None) or "flat")
    keys = {row.key for row in result.rows}
    requests = [r for r in benchmark.requests(None) if r.key in keys]
    return len(named.write(Path(folder), requests, found))


def write_samples(result: EvalResult, path: str | Path) -> None:
    """One line for each picture, as ``.jsonl``, ``.csv`` or ``.parquet``.

    Raises:
        TableFormatError, MissingExtraError: see :func:`mmalign.runtime.tables.check_table_path`.
    """
    # A seed has 63 bits, which a table's floats do not hold.
    rows = [{**{n: getattr(r, n) for n in COLUMNS}, "seed": str(r.seed)} for r in result.rows]
    parts = dict.fromkeys(f"part_{n}" for row in result.rows for n in row.parts)
    for line, row in zip(rows, result.rows, strict=True):
        line.update({name: row.parts.get(name.removeprefix("part_")) for name in parts})
    columns = {**COLUMNS, **dict.fromkeys(parts, float)}
    said = {"benchmark": result.benchmark, "version": result.version, "policy": result.policy}
    write_table(path, rows, columns, said)


def _check(policy: Any, images: Any, out: Any, table: Any, export: Any) -> None:
    """Refuse, before any work, what could not be finished."""
    if (policy is None) == (images is None):
        raise ValueError("give a policy to generate with, or images that are there already")
    if table is not None:
        check_table_path(table)
    if export is not None and (out is None or images is not None):
        raise ValueError("export copies pictures that were generated and kept: give policy and out")


def _refuse_sampling(options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} belong to generating; images are judged as they are")


def _write(
    result: EvalResult, benchmark: Any, report: bool, table: Any, export: Any, layout: str | None
) -> None:
    if report and result.folder is not None:
        from eval.report import evaluation_report

        evaluation_report(result, result.folder / "report.html")
    if table is not None:
        write_samples(result, table)
    if export is not None:
        export_pictures(result, benchmark, export, layout)


__all__ = ["evaluate", "export_pictures", "write_samples"]
