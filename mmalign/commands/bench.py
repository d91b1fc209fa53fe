"""``mmalign bench``."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from mmalign.commands.common import given


def run(args: Namespace) -> int:
    """Measure and print JSON; ``--out`` also writes it."""
    from mmalign import api

    names = ("device", "dtype", "batch_size", "steps", "out")
    options: dict[str, Any] = given(**{n: getattr(args, n) for n in names})
    print(json.dumps(api.bench(args.policy, **options), indent=2))
    return 0
