"""``mmalign list``: names and one line each, without importing what they name."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
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
    "reward-benchmarks": _registered(registry.REWARD_BENCHMARKS),
    "kernels": _registered(registry.KERNELS),
    "recipes": _recipes,
}
ALIASES = {"methods": "steerers", "steering": "steerers"}


DIRECTION = "higher is better"  # of every reward; those that measure a fault are negated


def _facts(info: Any) -> list[str]:
    """What the first table says of a reward besides its name and summary."""
    ends = ["-inf" if info.range[0] is None else f"{info.range[0]:g}"]
    ends.append("inf" if info.range[1] is None else f"{info.range[1]:g}")
    gradient = "yes" if info.differentiable else ""
    return ["+".join(info.media), f"{ends[0]}..{ends[1]}", gradient, memory_text(info)]


def memory_text(info: Any) -> str:
    """Memory of the weights of a :class:`~mmalign.reward_info.RewardInfo` in fp32 and in bf16."""
    sizes = list(info.weight_bytes.values())
    if not any(sizes):
        return ""
    unit, name = (1e9, "GB") if max(sizes) >= 1e8 else (1e6, "MB")
    return f"{' / '.join(f'{size / unit:.3g}' for size in sizes)} {name}"


def _origins(entries: Sequence[registry.Entry]) -> str:
    """The second table: under which licence, with which weights, after which work."""
    rows = []
    for e in entries:
        if e.info is not None:
            rows.append([e.name, e.info.licence, e.info.checkpoint or "-", e.info.source])
    return table(rows, ["rewards", "licence", "default checkpoint", "source"])


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
        print(table(_page(entries[0]), ["reward", name]))
    else:
        head = [f"rewards ({DIRECTION})", "media", "range", "gradient", "fp32 / bf16", ""]
        rows = [[e.name, *(_facts(e.info) if e.info else [""] * 4), e.summary] for e in entries]
        print(table(rows, head), _origins(entries), sep="\n\n")
        print(
            "\nMemory is that of the default checkpoint's weights; 'mmalign bench --reward NAME' "
            "measures the peak.\n'mmalign list rewards NAME' shows one reward in full."
        )
    return 0


def _declared(entry: registry.Entry) -> dict[str, Any]:
    if entry.info is None:  # registered by somebody else, without a declaration
        return {"summary": entry.summary, "target": entry.target}
    facts = dataclasses.asdict(entry.info)
    memory = entry.info.weight_bytes if entry.info.parameters else None
    return {**facts, "direction": DIRECTION, "memory_bytes": memory, "target": entry.target}


def _page(entry: registry.Entry) -> list[list[str]]:
    """One reward in full, row by row."""
    facts = _declared(entry)
    if facts.pop("memory_bytes", None):
        facts["memory"] = f"{memory_text(entry.info)} (weights in fp32 / bf16)"
    count = facts.pop("parameters", 0)
    if count:
        facts["parameters"] = f"{count:g} million"
    return [[k.replace("_", " "), _plain(v)] for k, v in facts.items() if v not in ("", None, ())]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
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
