"""``mmalign bench --gradient-steps``: memory and time of a reward gradient over its steps."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from mmalign.commands.common import CommandError, table

HEAD = ["memory", "steps", "evaluations", "update s", "images/s", "peak GB"]


def run(args: Namespace, options: dict[str, Any]) -> int:
    """Measure and print a table, or JSON."""
    from trainers.bench_gradient import bench_gradient_steps

    if args.kl_beta is not None:
        raise CommandError("--kl-beta is not measured with --gradient-steps: leave it out")
    result = bench_gradient_steps(args.policy, counts(args.gradient_steps), **options)
    print(json.dumps(result, indent=2) if args.json else summary(result))
    return 0


def counts(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not part.isdigit()]:
        raise CommandError(f"--gradient-steps: {wrong[0]!r} is no whole number; write 1,2,4,8")
    return [int(part) for part in parts]


def summary(result: dict[str, Any]) -> str:
    """The measurement as a table, with settings above."""
    s = result["settings"]
    rows = [
        [
            row["memory"],
            row["last"],
            row["evaluations"],
            f"{row['seconds']['median']:.3g}",
            f"{row['images_per_second']['median']:.3g}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        ]
        for row in result["rows"]
    ]
    title = (
        f"{result['policy']} on {s['device']} in {s['dtype']}, {s['width']} x {s['height']} px, "
        f"batch {s['batch_size']}, {s['images']} images, {s['steps']} steps, "
        f"guidance {s['guidance_scale']:g}, {s['threads']} threads, {s['reward']}"
    )
    return "\n".join((title, table(rows, HEAD)))
