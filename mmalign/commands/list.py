"""``mmalign list``: names and one line each, without importing what they name."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable

from mmalign import registry
from mmalign.commands.common import table

Listing = list[tuple[str, str]]


def _registered(entries: registry.Registry) -> Callable[[], Listing]:
    return lambda: [(e.name, e.summary) for e in entries]


def _recipes() -> Listing:
    """Shipped recipes; a recipe's first comment line says what it does."""
    from mmalign.assets import shipped_recipes

    listing = []
    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        listing.append((name, first.lstrip("# ").rstrip() if first.startswith("#") else ""))
    return listing


KINDS: dict[str, Callable[[], Listing]] = {
    "rewards": _registered(registry.REWARDS),
    "policies": _registered(registry.POLICIES),
    "objectives": _registered(registry.OBJECTIVES),
    "steerers": _registered(registry.STEERERS),
    "benchmarks": _registered(registry.BENCHMARKS),
    "kernels": _registered(registry.KERNELS),
    "recipes": _recipes,
}
ALIASES = {"methods": "steerers", "steering": "steerers"}


def run(args: Namespace) -> int:
    """Print one kind, or all."""
    kind = ALIASES.get(args.kind, args.kind)
    if kind is not None and kind not in KINDS and f"{kind}s" in KINDS:
        kind = f"{kind}s"
    if kind is not None and kind not in KINDS:
        raise registry.unknown("kind", kind, [*KINDS, *ALIASES])
    found = {k: KINDS[k]() for k in ([kind] if kind else KINDS)}
    if args.json:
        print(json.dumps({k: dict(v) for k, v in found.items()}, indent=2))
        return 0
    for name, entries in found.items():
        print(table(entries, [name, ""]) if entries else f"{name}\n(none)")
        if kind is None:
            print()
    return 0
