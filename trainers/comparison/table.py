"""The table of what is compared: methods, claims, budget; see ``methods.yaml`` beside this file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmalign.config import ConfigError, from_dict, load_yaml
from mmalign.registry import unknown

SHIPPED = Path(__file__).with_name("methods.yaml")
LONGEST_TITLE = 22


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row: a recipe with overrides.

    ``proxies`` are the measures on held-out pictures that stand for the trained reward. A
    ``control`` is no method of a paper but the other side of a claim.
    """

    title: str
    recipe: str
    overrides: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ("partial",)
    paper: str = ""
    claim: str = ""
    control: bool = False

    def __post_init__(self) -> None:
        if not 0 < len(self.title) <= LONGEST_TITLE:
            raise ConfigError(
                f"title {self.title!r} has {len(self.title)} characters; charts have room for "
                f"1 to {LONGEST_TITLE}"
            )


@dataclass(frozen=True, kw_only=True)
class Short:
    """What the rehearsal changes; its overrides come after those of the row."""

    nfe: int
    points: int
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """The whole comparison. ``claims`` are read by whoever decides them."""

    nfe: int
    points: int
    seeds: tuple[int, ...]
    reference: str
    methods: Mapping[str, Method]
    claims: tuple[Mapping[str, Any], ...] = ()
    overrides: tuple[str, ...] = ()
    short: Short | None = None
    last: tuple[str, ...] = field(default=())  # overrides after those of the rows

    def __post_init__(self) -> None:
        for name in ("nfe", "points"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds are {list(self.seeds)}; give one or more, each once")
        for name in (self.reference, *(self.short.methods if self.short else ())):
            if name not in self.methods:
                raise unknown("method", name, self.methods)
        for claim in self.claims:
            for side in ("better", "than"):
                if claim.get(side) not in self.methods:
                    raise unknown(f"method ({side})", str(claim.get(side)), self.methods)


def read_table(path: str | Path = SHIPPED) -> Table:
    """The table in a YAML file.

    Raises:
        ConfigError: not such a table. UnknownNameError: a claim about no method of it.
    """
    return from_dict(Table, load_yaml(path))


def choose(
    table: Table,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    nfe: int = 0,
    short: bool = False,
) -> Table:
    """The table restricted to some methods, seeds or another budget; empty and 0 leave it.

    The reference method is drawn beside every other, so it is kept unless methods are named.

    Raises:
        UnknownNameError: no such method. ConfigError: no such rehearsal, or impossible numbers.
    """
    if short:
        if table.short is None:
            raise ConfigError("this table has no section 'short'")
        dials = table.short
        last = (*table.last, *dials.overrides)
        table = replace(table, nfe=dials.nfe, points=dials.points, seeds=dials.seeds, last=last)
        methods = methods or dials.methods
    for name in methods:
        if name not in table.methods:
            raise unknown("method", name, table.methods)
    wanted = tuple(dict.fromkeys(methods)) or tuple(table.methods)
    return replace(
        table,
        nfe=nfe or table.nfe,
        seeds=tuple(seeds) or table.seeds,
        reference=table.reference if table.reference in wanted else wanted[0],
        methods={name: table.methods[name] for name in wanted},
        claims=tuple(c for c in table.claims if {c["better"], c["than"]} <= set(wanted)),
        short=None,
    )
