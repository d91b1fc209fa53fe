"""``mmalign bench``."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from mmalign.commands.common import CommandError, given, table

_OPTIONS = (
    "device", "dtype", "batch_size", "images", "steps", "guidance_scale", "size", "repeats",
    "adapter", "lora_rank", "kl_beta", "attention", "gradient_checkpointing", "compile", "threads",
    "out",
)  # fmt: skip


_FEW_STEP = ("teacher", "evaluations", "lora", "margin")
_FEW_STEP_FOREIGN = (*_OPTIONS, "reward", "batch_sizes", "objectives", "gradient_steps")
_METHODS = ("methods", "seeds", "nfe", "table", "short", "jobs", "markdown", "records", "tuned")
_EVALUATION_OPTIONS = (
    "device", "dtype", "batch_size", "images", "steps", "guidance_scale", "repeats", "out",
)  # fmt: skip
_REWARD_OPTIONS = ("device", "dtype", "size", "repeats", "threads")


def run(args: Namespace) -> int:
    """Measure and print a table, or JSON; ``--out`` also writes the JSON."""
    if args.what == "methods":
        from mmalign.commands.bench_methods import run as compare

        return compare(args)
    if args.what == "panel":
        from mmalign.commands.bench_panel import run as count_alarms

        return count_alarms(args)
    if args.what == "steering":
        from mmalign.commands.bench_steering import run as compare_steering

        return compare_steering(args)
    if said := [n for n in _METHODS if getattr(args, n) not in (None, False)]:
        raise CommandError(f"--{said[0]} belongs to: mmalign bench methods, or bench steering")
    if args.what == "few-step":
        from mmalign.commands.bench_few_step import run as compare_few_step

        return compare_few_step(args, _FEW_STEP_FOREIGN)
    if said := [n for n in _FEW_STEP if getattr(args, n) is not None]:
        raise CommandError(f"--{said[0]} belongs to: mmalign bench few-step")
    from mmalign import api

    if args.policy is None:
        if args.evaluate is not None:
            raise CommandError("--evaluate needs --policy, the generator to evaluate")
        return _rewards(args)
    if args.batch_sizes is not None:
        raise CommandError("--batch-sizes measures rewards alone: leave out --policy")
    if args.evaluate is not None:
        return _evaluation(args)
    options: dict[str, Any] = given(**{n: getattr(args, n) for n in _OPTIONS})
    if args.reward is not None:
        options["reward"] = "+".join(args.reward)
    if args.objectives is not None:
        from mmalign.commands.bench_objectives import run as compare_objectives

        return compare_objectives(args, options)
    if args.gradient_steps is not None:
        from mmalign.commands.bench_gradient import run as follow_gradients

        return follow_gradients(args, options)
    result = api.bench(args.policy, **options)
    print(json.dumps(result, indent=2) if args.json else summary(result))
    return 0


def _evaluation(args: Namespace) -> int:
    """Measure an evaluation from the prompt to the file."""
    from eval.bench import bench_evaluation

    if odd := [n for n in _OPTIONS if n not in _EVALUATION_OPTIONS and getattr(args, n)]:
        raise CommandError(f"--{odd[0].replace('_', '-')} does not belong to --evaluate")
    options = given(**{n: getattr(args, n) for n in _EVALUATION_OPTIONS})
    result = bench_evaluation(args.policy, args.evaluate, **options)  # type: ignore[arg-type]
    rate, s = result["images_per_second"], result["settings"]
    text = (
        f"{result['policy']} through {result['benchmark']} on {s['device']}: {s['images']} "
        f"pictures of {s['size']} px, {s['steps']} steps, batch {s['batch_size']}\n"
        f"{_short(rate['median'])} pictures/s end to end ({_short(rate['min'])} to "
        f"{_short(rate['max'])}), generating {result['generating']:.1%} of the time"
    )
    print(json.dumps(result, indent=2) if args.json else text)
    return 0


def _rewards(args: Namespace) -> int:
    """Measure rewards alone."""
    from mmalign.runtime.files import atomic_write_json
    from vision_rewards.bench import bench_rewards

    for name in ("objectives", "gradient_steps"):
        if getattr(args, name) is not None:
            said = f"--{name.replace('_', '-')}"
            raise CommandError(f"{said} needs --policy, the generator to measure them on")
    if not args.reward:
        raise CommandError("give --policy, or --reward to measure rewards alone")
    options = given(**{n: getattr(args, n) for n in _REWARD_OPTIONS})
    if args.batch_sizes is not None:
        options["batch_sizes"] = [_whole(n) for n in args.batch_sizes.split(",")]
    result = bench_rewards(args.reward, **options)  # type: ignore[arg-type]
    if args.out is not None:
        atomic_write_json(args.out, result)
    print(json.dumps(result, indent=2) if args.json else rewards_summary(result))
    return 0


def _whole(text: str) -> int:
    if not text.strip().isdigit():
        raise CommandError(f"--batch-sizes: {text.strip()!r} is no whole number; write 1,8,32")
    return int(text)


def rewards_summary(result: dict[str, Any]) -> str:
    """The measurement of rewards as a table."""
    rows = [
        [
            reward["reward"],
            row["batch_size"],
            *(_short(row["images_per_second"][k]) for k in ("median", "min", "max")),
            _short(row["tflops"]) if row["tflops"] else None,
            f"{row['share_of_matmul']:.1%}" if row["tflops"] else None,
            _short(row["peak_bytes"] / 1e9),
        ]
        for reward in result["rewards"]
        for row in reward["batches"]
    ]
    head = ["reward", "batch", "images/s", "lowest", "highest", "TFLOP/s", "of matmul", "peak GB"]
    s, ceiling = result["settings"], result["matmul"]
    return "\n".join(
        (
            f"{s['size']} x {s['size']} px on {s['device']}, {s['threads']} threads",
            table(rows, head),
            f"matrix product: {ceiling['tflops']:.3g} TFLOP/s in {ceiling['dtype']}",
        )
    )


def summary(result: dict[str, Any]) -> str:
    """The measurement as a table of stages, with settings above and memory below."""
    s, memory, ceiling = result["settings"], result["memory"], result["matmul"]
    title = (
        f"{result['policy']} on {s['device']} in {s['dtype']}, {s['width']} x {s['height']} px, "
        f"batch {s['batch_size']}, {s['images']} images, {s['steps']} steps, "
        f"guidance {s['guidance_scale']:g}, {s['threads']} threads"
    )
    rows = [row for n, stage in result["stages"].items() if stage for row in _rows(n, stage)]
    head = ["stage", "unit", "count", "a second", "lowest", "highest", "TFLOP/s", "of matmul"]
    peaks = {n: memory[f"{n}_peak_bytes"] / 1e9 for n in ("rollout", "update")}
    count = result["parameters"]
    return "\n".join(
        (
            title,
            table(rows, head),
            f"training step: {result['step']['seconds']:.3f} s, "
            f"{result['step']['images_per_second']:.3f} images/s",
            f"matrix product: {ceiling['tflops']:.3g} TFLOP/s ({ceiling['side']} square)",
            f"peak memory ({memory['kind'].replace('_', ' ')}): rollout {peaks['rollout']:.2f} GB, "
            f"update {peaks['update']:.2f} GB",
            f"parameters: {count['denoiser']:,}, of these or added {count['trainable']:,} trained",
        )
    )


def _rows(name: str, stage: dict[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for unit, rate in stage["per_second"].items():
        work = [name, unit.replace("_", " "), stage["work"][unit]]
        rates = [_short(rate[k]) for k in ("median", "min", "max")]
        rows.append([*work, *rates, None, None])
    if "tflops" in stage:
        rows[-1][-2:] = [_short(stage["tflops"]), f"{stage['share_of_matmul']:.1%}"]
    return rows


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
