"""``mmalign bench methods``: training methods at equal compute, claims decided by intervals."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from mmalign.commands.common import CommandError, table
from mmalign.runtime.log import say

OUT = "runs/methods"
_FOREIGN = (
    "policy", "device", "dtype", "batch_size", "batch_sizes", "images", "steps", "guidance_scale",
    "size", "repeats", "adapter", "lora_rank", "kl_beta", "reward", "attention",
    "gradient_checkpointing", "compile", "objectives",
)  # fmt: skip


def run(args: Namespace) -> int:
    """Run what is missing, write the page, print the tables; 1 where a run failed."""
    from eval.methods.claims import read_claims
    from trainers.comparison.runner import run_all
    from trainers.comparison.table import SHIPPED, choose, read_table

    if said := [n for n in _FOREIGN if getattr(args, n) is not None]:
        option = said[0].replace("_", "-")
        raise CommandError(f"--{option} measures speed: it does not go with bench methods")
    chosen = choose(
        read_table(args.table or SHIPPED), _names(args.methods), _numbers(args.seeds),
        _at_least("--nfe", args.nfe, 1) or 0, args.short,
    )  # fmt: skip
    read_claims(chosen.claims)  # a broken claim is better found now than after hours
    jobs = _at_least("--jobs", args.jobs, 0)
    out = Path(args.out or OUT + ("-short" if args.short else ""))
    record = run_all(
        chosen, out, 1 if jobs is None else jobs, _at_least("--threads", args.threads, 1) or 1
    )
    _show(record, out, args)
    return int(any(r["state"] == "failed" for r in record["runs"]))


def _show(record: dict[str, Any], out: Path, args: Namespace) -> None:
    from eval.methods.markdown import write_markdown
    from eval.methods.page import comparison_page
    from eval.methods.read import read_comparison
    from eval.methods.summary import Summary

    for failed in (r for r in record["runs"] if r["state"] == "failed"):
        say(f"{failed['method']}, seed {failed['seed']} failed: {failed['error']}")
    if not any(r["state"] == "finished" for r in record["runs"]):
        say("no run is finished: there is no page to write")
        return
    summary = Summary(read_comparison(out))
    page = comparison_page(summary, out / "comparison.html")
    if args.markdown:
        write_markdown(summary, args.markdown)
    print(json.dumps(_plain(summary), indent=2) if args.json else _text(summary))
    say(f"page written to {page}")


def _text(summary: Any) -> str:
    from eval.methods.markdown import CLAIM_HEAD, METHOD_HEAD, claim_cells, method_cells

    tables = [table([method_cells(line) for line in summary.lines], METHOD_HEAD)]
    if summary.decided:
        tables.append(table([claim_cells(d) for d in summary.decided], CLAIM_HEAD))
    return "\n\n".join(tables)


def _plain(summary: Any) -> dict[str, Any]:
    methods = {
        line.runs.name: {
            **{n: line.runs.mean(n) for n in ("updates", "nfe", "seconds")},
            "accuracy": line.accuracy.to_json(),
            "gain": line.gain.to_json(),
            "verdict": line.word,
        }
        for line in summary.lines
    }
    claims = [
        {"claim": d.claim.says, "better": d.claim.better, "than": d.claim.than, "verdict": d.word,
         "difference": None if d.interval is None else d.interval.to_json()}
        for d in summary.decided
    ]  # fmt: skip
    return {"methods": methods, "claims": claims}


def _names(text: str | None) -> list[str]:
    return [n.strip() for n in (text or "").split(",") if n.strip()]


def _numbers(text: str | None) -> list[int]:
    for name in _names(text):
        if not name.isdigit():
            raise CommandError(f"--seeds: {name!r} is no whole number; write 0,1,2")
    return [int(n) for n in _names(text)]


def _at_least(option: str, value: int | None, least: int) -> int | None:
    if value is not None and value < least:
        raise CommandError(f"{option} is {value}; it must be {least} or more")
    return value
