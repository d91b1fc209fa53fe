"""``mmalign bench panel``: false alarms and finds of the diagnostics panel over many runs."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import partial

from mmalign.commands.bench_methods import (
    _FOREIGN,
    at_least,
    keep_records,
    names,
    numbers,
    refuse,
    run_missing,
)
from mmalign.commands.common import table
from mmalign.runtime.log import say

OUT = "runs/panel"


def run(args: Namespace) -> int:
    """Run what is missing and print how often flags were raised; 1 where a run failed."""
    from trainers.comparison.alarms import HEAD, alarms
    from trainers.comparison.runner import run_all
    from trainers.comparison.table import PANEL, choose, read_table

    refuse(args, (*_FOREIGN, "markdown"), "panel")
    chosen = choose(
        read_table(args.table or PANEL), names(args.methods), numbers(args.seeds),
        at_least("--nfe", args.nfe, 1) or 0, args.short,
    )  # fmt: skip
    record, out = run_missing(args, OUT, partial(run_all, chosen))
    keep_records(args, out)
    failed = [r for r in record["runs"] if r["state"] == "failed"]
    for r in failed:
        say(f"{r['method']}, seed {r['seed']} failed: {r['error']}")
    found = alarms(record, out)
    if args.json:
        print(json.dumps([one.to_json() for one in found], indent=2))
    else:
        print(table([one.cells() for one in found], HEAD))
    return int(bool(failed))
