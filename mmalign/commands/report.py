"""``mmalign report``."""

from __future__ import annotations

from argparse import Namespace


def run(args: Namespace) -> int:
    """Write the HTML page of a run again and print where it is."""
    from mmalign import api

    print(api.report(args.run, out=args.out))
    return 0
