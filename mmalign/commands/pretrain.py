"""``mmalign pretrain``."""

from __future__ import annotations

from argparse import Namespace


def run(args: Namespace) -> int:
    """Make a shipped small model again; continues where an earlier call stopped."""
    from mmalign import api

    print(api.pretrain(args.what, args.overrides, output_dir=args.output_dir))
    return 0
