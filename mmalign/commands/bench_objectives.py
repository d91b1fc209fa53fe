"""``mmalign bench --objectives``: what a training step of each objective costs."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from mmalign.commands.common import CommandError, table

HEAD = [
    "objective", "rollout images/s", "credit s", "update s", "step images/s", "evaluations rollout",
    "credit", "update", "peak GB",
]  # fmt: skip


def run(args: Namespace, options: dict[str, Any]) -> int:
    """Measure and print a table, or JSON; 1 where no objective fits the policy."""
    from trainers.bench_objectives import bench_objectives

    if args.kl_beta is not None:
        raise CommandError("--kl-beta belongs to one objective: with --objectives leave it out")
    result = bench_objectives(args.policy, names(args.objectives), **options)
    print(json.dumps(result, indent=2) if args.json else summary(result))
    return int(all("refused" in row for row in result["objectives"]))


def names(text: str) -> list[str]:
    """Names separated by commas; none for ``all``."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise CommandError("--objectives is empty; write all, or names separated by commas")
    return [] if found == ["all"] else found


def summary(result: dict[str, Any]) -> str:
    """The measurement as a table, with settings above and what was refused below."""
    rows = [_row(row) for row in result["objectives"] if "refused" not in row]
    refused = [f"{r['objective']}: {r['refused']}" for r in result["objectives"] if "refused" in r]
    s = result["settings"]
    title = result["policy"]
    if s:
        title += (
            f" on {s['device']} in {s['dtype']}, {s['width']} x {s['height']} px, "
            f"batch {s['batch_size']}, {s['images']} images, {s['steps']} steps, "
            f"guidance {s['guidance_scale']:g}, {s['threads']} threads"
        )
    return "\n".join((title, *([table(rows, HEAD)] if rows else []), *refused))


def _row(row: dict[str, Any]) -> list[object]:
    stages, spent = row["stages"], row["evaluations"]
    return [
        row["objective"],
        f"{stages['rollout']['per_second']['images']['median']:.3g}",
        *(f"{stages[n]['seconds']['median']:.3g}" for n in ("credit", "update")),
        f"{row['images_per_second']:.3g}",
        *(spent[n] for n in ("rollout", "credit", "update")),
        f"{row['peak_bytes'] / 1e9:.2f}",
    ]
