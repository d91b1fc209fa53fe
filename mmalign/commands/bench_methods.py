"""``mmalign bench methods``: training methods at equal compute, claims decided by intervals."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.commands.common import CommandError, table
from mmalign.runtime.log import say

OUT = "runs/methods"
_FOREIGN = (
    "policy", "device", "dtype", "batch_size", "batch_sizes", "images", "steps", "guidance_scale",
    "size", "repeats", "adapter", "lora_rank", "kl_beta", "reward", "attention",
    "gradient_checkpointing", "compile", "objectives", "gradient_steps", "teacher",
    "evaluations", "tuned",
)  # fmt: skip


def run(args: Namespace) -> int:
    """Run what is missing, write the page, print the tables; 1 where a run failed."""
    from eval.methods.claims import read_claims
    from trainers.comparison.runner import run_all
    from trainers.comparison.table import SHIPPED, choose, read_table

    refuse(args, _FOREIGN, "methods")
    chosen = choose(
        read_table(args.table or SHIPPED), names(args.methods), numbers(args.seeds),
        at_least("--nfe", args.nfe, 1) or 0, args.short,
    )  # fmt: skip
    read_claims(chosen.claims)  # a broken claim is better found now than after hours
    return compare(args, OUT, partial(run_all, chosen))


def refuse(args: Namespace, foreign: Sequence[str], what: str) -> None:
    """Stop at an option of another form of ``bench``.

    Raises:
        CommandError: names the option.
    """
    if said := [n for n in foreign if getattr(args, n) is not None]:
        option = said[0].replace("_", "-")
        raise CommandError(f"--{option} does not go with bench {what}; leave it out")


def compare(args: Namespace, default: str, run_all: Callable[..., dict[str, Any]]) -> int:
    """Run what is missing and show it; 1 where a run failed.

    Args:
        default: folder where ``--out`` is not given.
        run_all: takes the folder, jobs and threads; returns the record of the comparison.
    """
    record, out = run_missing(args, default, run_all)
    _show(record, out, args)
    keep_records(args, out)  # after the page, whose claims have asked their judges
    return int(any(r["state"] == "failed" for r in record["runs"]))


def run_missing(
    args: Namespace, default: str, run_all: Callable[..., dict[str, Any]]
) -> tuple[dict[str, Any], Path]:
    """Run what neither the folder nor ``--records`` has; the record and the folder.

    Args:
        default, run_all: as of :func:`compare`.
    """
    jobs = at_least("--jobs", args.jobs, 0)
    out = Path(args.out or default + ("-short" if args.short else ""))
    threads = at_least("--threads", args.threads, 1) or 1
    _from_records(args, out)
    return run_all(out, 1 if jobs is None else jobs, threads), out


def _from_records(args: Namespace, out: Path) -> None:
    """Put the runs of ``--records`` that ``out`` lacks there, where that archive exists.

    Raises:
        CommandError: it is no such archive.
    """
    from eval.methods.records import RecordsError, unpack

    if args.records and Path(args.records).exists():
        try:
            say(f"{unpack(args.records, out)} runs taken from {args.records}")
        except RecordsError as error:
            raise CommandError(str(error)) from error


def keep_records(args: Namespace, out: Path) -> None:
    """Write all runs of ``out`` that have ended into ``--records``, if that is asked for."""
    from eval.methods.records import pack

    if args.records:
        say(f"{pack(out, args.records)} runs kept in {args.records}")


def _show(record: dict[str, Any], out: Path, args: Namespace) -> None:
    from eval.methods.markdown import write_markdown
    from eval.methods.page import comparison_page
    from eval.methods.read import ENDED, read_comparison
    from eval.methods.summary import Summary

    for failed in (r for r in record["runs"] if r["state"] == "failed"):
        say(f"{failed['method']}, seed {failed['seed']} failed: {failed['error']}")
    if not any(r["state"] in ENDED for r in record["runs"]):
        say("no run is finished: there is no page to write")
        return
    summary = Summary(read_comparison(out))
    page = comparison_page(summary, out / "comparison.html")
    if args.markdown:
        write_markdown(summary, args.markdown, Path(args.table).stem if args.table else "")
    print(json.dumps(_plain(summary), indent=2) if args.json else _text(summary))
    say(f"page written to {page}")


def _text(summary: Any) -> str:
    from eval.methods.markdown import CLAIM_HEAD, claim_cells
    from eval.methods.words import judged, words_of

    words = words_of(summary)
    tables = [table([words.cells(line) for line in summary.lines], words.head)]
    if found := judged(summary):
        tables.append(table(found[1], found[0]))
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
            "why": line.lacks,
            "interquartile_mean": line.iqm.to_json(),
            "above_reference": line.improvement.to_json() if line.improvement else None,
            "diverged": {run.seed: run.diverged for run in line.runs.runs if run.diverged},
            **_of_steering(line),
        }
        for line in summary.lines
    }
    claims = [
        {"claim": d.claim.says, "better": d.claim.better, "than": d.claim.than, "verdict": d.word,
         "why": d.why,
         "difference": None if d.interval is None else d.interval.to_json()}
        for d in summary.decided
    ]  # fmt: skip
    return {"methods": methods, "claims": claims, "unfinished": summary.comparison.unfinished}


def _of_steering(line: Any) -> dict[str, Any]:
    """What rows of a comparison of steering have besides."""
    if not line.runs.runs[0].costs:
        return {}
    ahead = {unit: interval.to_json() for unit, interval in line.ahead.items()}
    return {"ahead_of_best_of_n": ahead, "own_overhead": line.overhead}


def names(text: str | None) -> list[str]:
    """What stands between commas."""
    return [n.strip() for n in (text or "").split(",") if n.strip()]


def numbers(text: str | None) -> list[int]:
    """Whole numbers between commas.

    Raises:
        CommandError: one that is none.
    """
    for name in names(text):
        if not name.isdigit():
            raise CommandError(f"--seeds: {name!r} is no whole number; write 0,1,2")
    return [int(n) for n in names(text)]


def at_least(option: str, value: int | None, least: int) -> int | None:
    """An option's number.

    Raises:
        CommandError: it is below ``least``.
    """
    if value is not None and value < least:
        raise CommandError(f"{option} is {value}; it must be {least} or more")
    return value
