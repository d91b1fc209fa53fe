"""``mmalign preflight``."""

from __future__ import annotations

from argparse import Namespace


def run(args: Namespace) -> int:
    """Run the checks and print them; 1 when one failed."""
    from mmalign import api

    report = api.preflight(args.recipe, args.overrides)
    for check in report.checks:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}")
    print("ready to train" if report.ok else "not ready: mend what failed above")
    return 0 if report.ok else 1
