"""``mmalign steer``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmalign.commands.common import CommandError, given, prompts_of, table

if TYPE_CHECKING:
    from mmalign.commands.steer_run import Run


def run(args: Namespace) -> int:
    """Steer, then write pictures, records, a contact sheet and the page."""
    from mmalign.commands.steer_run import Plan, Run
    from mmalign.config import apply_overrides
    from mmalign.runtime.files import make_directory

    out = make_directory(args.out)  # before anything is computed
    prompts, benchmark, requests = asked(args)
    plan = Plan(
        policy=args.policy, prompts=prompts, reward=args.reward, method=args.method,
        seed=args.seed, options=apply_overrides({}, args.option), budget=args.budget,
        held_out=args.held_out, benchmark=benchmark, requests=requests, lora=args.lora,
        **given(device=args.device, chunk=args.chunk),  # type: ignore[arg-type]
    )  # fmt: skip
    work = Run(plan, out)
    work.go()
    summary = finish(work, report=not args.no_report)
    print(told(summary))
    print(f"written to {out}")
    return 0


def asked(args: Namespace) -> tuple[list[str], Any, list[Any]]:
    """Prompts, and the benchmark and its requests where they come from one.

    Raises:
        CommandError: ``--limit`` below 1. UnknownNameError: no such benchmark.
    """
    if args.limit is not None and args.limit < 1:
        raise CommandError(f"--limit must be 1 or more, got {args.limit}")
    if args.benchmark is None:
        return (prompts_of(args) or [])[: args.limit], None, []
    from mmalign.registry import BENCHMARKS

    benchmark = BENCHMARKS.load(args.benchmark)()
    # One picture a prompt: equal prompts would be steered to equal pictures.
    distinct: dict[str, Any] = {}
    for request in benchmark.requests():
        distinct.setdefault(request.prompt, request)
    requests = list(distinct.values())[: args.limit]
    return [r.prompt for r in requests], benchmark, requests


def finish(work: Run, report: bool = True) -> dict[str, Any]:
    """Write ``steer.json``, the contact sheet and the page of a finished run; what is in the
    first."""
    from mmalign.commands.contact_sheet import contact_sheet
    from mmalign.runtime.files import atomic_path, atomic_write_json
    from mmalign.runtime.versions import environment

    folder, records = work.store.folder, work.store.finished()
    lora = {"lora": work.plan.lora}
    summary = {**work.settings, **lora, **totals(records), "environment": environment()}
    atomic_write_json(folder / "steer.json", summary)
    with atomic_path(folder / "contact_sheet.png") as partial:
        contact_sheet(folder, records).save(partial, format="PNG")
    if report:
        from eval.steering_page import steering_report

        steering_report(folder)
    return summary


def totals(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of all prompts, with and without steering, and what it cost."""
    held = {name for r in records for name in r["held_out"]}
    return {
        "prompts": [r["prompt"] for r in records],
        "scores": [r["score"] for r in records],
        "unsteered_scores": [r["unsteered_score"] for r in records],
        "held_out_scores": {
            name: {
                kind: [r["held_out"][name][kind] for r in records]
                for kind in ("steered", "unsteered")
            }
            for name in sorted(held)
        },
        "candidates": [{"prompt": r["index"], **c} for r in records for c in r["candidates"]],
        "chosen": [r["chosen"] for r in records],
        "nfe": round(sum(r["nfe"] for r in records)),
        "reward_calls": round(sum(r["reward_calls"] for r in records)),
        "decodes": round(sum(r["decodes"] for r in records)),
        "bare_nfe": max((r["unsteered_nfe"] for r in records), default=0),
        "seconds": sum(r["seconds"] for r in records),
        "memory": max((r["memory"] for r in records), default=0),
    }


def told(summary: Mapping[str, Any]) -> str:
    """Scores as a table of rewards: steered and not, mean over the prompts both could be scored."""
    pairs = {"steering reward": (summary["scores"], summary["unsteered_scores"])}
    for name, both in summary["held_out_scores"].items():
        pairs[f"held out: {name}"] = both["steered"], both["unsteered"]
    rows = []
    for name, (steered, bare) in pairs.items():
        both = [(a, b) for a, b in zip(steered, bare, strict=True) if None not in (a, b)]
        means = [sum(column) / len(both) if both else None for column in zip(*both, strict=True)]
        better = sum(a > b for a, b in both)
        rows.append([name, *(means or [None, None]), f"{better} of {len(both)}"])
    text = table(rows, ["", "steered", "unsteered", "better"])
    spent = (
        f"{summary['nfe']} network evaluations, {summary['reward_calls']} reward calls, "
        f"{summary['seconds']:.1f} s"
    )
    return f"{text}\n{len(summary['candidates'])} candidates, {spent}"
