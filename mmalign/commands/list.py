"""``mmalign list``: names and one line each, without importing what they name."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from mmalign import registry
from mmalign.commands.common import CommandError, table

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


def _facts(info: Any) -> list[str]:
    """What the table says of a reward besides its name and summary."""
    ends = ["-inf" if info.range[0] is None else f"{info.range[0]:g}"]
    ends.append("inf" if info.range[1] is None else f"{info.range[1]:g}")
    size = f"{info.parameters * 4 / 1000:.2f} GB" if info.parameters else ""
    gradient = "gradient" if info.differentiable else ""
    return ["+".join(info.media), f"{ends[0]}..{ends[1]}", gradient, size]


def _rewards(json_too: bool, name: str | None) -> int:
    """Rewards with what they declare; one of them in full."""
    entries = list(registry.REWARDS)
    if name is not None:
        if name not in registry.REWARDS:
            raise registry.unknown("reward", name, [e.name for e in entries])
        entries = [e for e in entries if e.name == name]
    if json_too:
        print(json.dumps({"rewards": {e.name: _declared(e) for e in entries}}, indent=2))
    elif name is not None:
        rows = [[k.replace("_", " "), v] for k, v in _declared(entries[0]).items() if v]
        print(table([[k, _plain(v)] for k, v in rows], ["reward", name]))
    else:
        head = ["rewards (higher is better)", "media", "range", "", "fp32", ""]
        rows = [[e.name, *(_facts(e.info) if e.info else [""] * 4), e.summary] for e in entries]
        print(table(rows, head))
        print("\n'mmalign list rewards NAME' names source, licence and checkpoint.")
    return 0


def _declared(entry: registry.Entry) -> dict[str, Any]:
    if entry.info is None:  # registered by somebody else, without a declaration
        return {"summary": entry.summary, "target": entry.target}
    return {**dataclasses.asdict(entry.info), "target": entry.target}


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join("open" if v is None else str(v) for v in value)
    return str(value)


def run(args: Namespace) -> int:
    """Print one kind, or all."""
    kind = ALIASES.get(args.kind, args.kind)
    if kind is not None and kind not in KINDS and f"{kind}s" in KINDS:
        kind = f"{kind}s"
    if kind is not None and kind not in KINDS:
        raise registry.unknown("kind", kind, [*KINDS, *ALIASES])
    if kind == "rewards":
        return _rewards(args.json, args.name)
    if args.name is not None:
        raise CommandError(f"only rewards have a page of their own, not {kind}")
    found = {k: KINDS[k]() for k in ([kind] if kind else KINDS)}
    if args.json:
        print(json.dumps({k: dict(v) for k, v in found.items()}, indent=2))
        return 0
    for name, entries in found.items():
        print(table(entries, [name, ""]) if entries else f"{name}\n(none)")
        if kind is None:
            print()
    return 0
