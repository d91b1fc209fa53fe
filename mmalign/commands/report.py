"""``mmalign report``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path


def run(args: Namespace) -> int:
    """Write the HTML page of a run again and print where it is."""
    from mmalign import api

    if (Path(args.run) / "steer.json").is_file():
        from eval.steering_page import steering_report

        print(steering_report(args.run, args.out))
        return 0
    print(api.report(args.run, out=args.out))
    return 0
