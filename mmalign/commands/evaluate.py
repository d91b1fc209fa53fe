"""``mmalign evaluate``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from mmalign.commands.common import given, table


def run(args: Namespace) -> int:
    """Evaluate a generator and print accuracy per task with its interval."""
    from mmalign import api

    names = ("out", "lora", "steps", "guidance_scale", "limit", "batch_size", "samples_per_prompt",
             "device", "dtype")  # fmt: skip
    options: dict[str, Any] = given(**{n: getattr(args, n) for n in names})
    result = api.evaluate(args.policy, args.benchmark, report=not args.no_report, **options)
    print(summary(result))
    return 0


def summary(result: Any) -> str:
    """The result as a table of tasks, the overall mean last."""
    rows = [_row(task, s) for task, s in result.tasks.items()]
    rows.append(_row("mean over tasks", result.overall))
    title = f"{result.benchmark} {result.version}: {result.policy}"
    text = table(rows, ["task", "accuracy", "95 % interval", "pictures", "unscored"])
    cost = f"{result.seconds:.1f} s, {result.nfe:.0f} network evaluations"
    where = f"\nwritten to {result.folder}" if result.folder else ""
    return f"{title}\n{text}\n{cost}{where}"


def _row(task: str, part: Any) -> list[object]:
    interval = part.accuracy
    bounds = f"[{interval.low:.3f}, {interval.high:.3f}]" if interval.defined else "too few"
    return [task, float(interval.mean), bounds, part.n, part.unscored]
