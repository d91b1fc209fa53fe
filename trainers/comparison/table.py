"""The table of what is compared: methods, claims, budget; see ``methods.yaml`` beside this file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmalign.config import ConfigError, from_dict, load_yaml
from mmalign.registry import unknown

SHIPPED = Path(__file__).with_name("methods.yaml")
PANEL = Path(__file__).with_name("panel.yaml")  # of `mmalign bench panel`
# Tables beside it: other families, two judged on pictures of their own, two from another start.
OTHERS = (
    "preferences", "gradients", "few_step", "control", "subject", "misled", "misled_ratio",
)  # fmt: skip
LONGEST_TITLE = 22


def prepared(words: Iterable[str]) -> tuple[str, ...]:
    """What of the prepared data is named in these, as ``{out}/NAME``."""
    return tuple(name for word in words for name in re.findall(r"\{out\}/(\w+)", word))


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

    @property
    def needs(self) -> tuple[str, ...]:
        """What this row trains on or starts from, by name."""
        return prepared(o for o in self.overrides if o.startswith(("pairs.data=", "policy=")))


@dataclass(frozen=True, kw_only=True)
class Short:
    """What the rehearsal changes; its overrides come after those of the row."""

    nfe: int
    points: int
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    prepare: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The whole comparison. ``claims`` are read by whoever decides them.

    ``prepare`` are commands of ``mmalign``, by the name of what they make: data that rows train on,
    made once, before the runs, in a folder that is added as ``--out``. A row names that folder as
    ``{out}/NAME`` in its overrides, and so may a later command. Arguments of ``short`` under the
    same name are added.
    """

    nfe: int
    points: int
    seeds: tuple[int, ...]
    reference: str
    methods: Mapping[str, Method]
    claims: tuple[Mapping[str, Any], ...] = ()
    overrides: tuple[str, ...] = ()
    prepare: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
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
        for name, method in self.methods.items():
            for made in method.needs:
                if made not in self.prepare:
                    raise unknown(f"data of method {name} (under prepare)", made, self.prepare)
        earlier = set[str]()
        for name, command in self.prepare.items():
            if late := [n for n in prepared(command) if n not in earlier]:
                raise ConfigError(f"prepare {name} needs {late[0]}, which must stand before it")
            earlier.add(name)
        for claim in self.claims:
            for side in ("better", "than"):
                if claim.get(side) not in self.methods:
                    raise unknown(f"method ({side})", str(claim.get(side)), self.methods)

    def needs(self, row: str) -> set[str]:
        """What has to be prepared for a row, by name: what it trains on, and what that needs."""
        wanted = set(self.methods[row].needs)
        for name in reversed(tuple(self.prepare)):
            if name in wanted:
                wanted.update(prepared(self.prepare[name]))
        return wanted


def read_table(path: str | Path = SHIPPED) -> Table:
    """The table in a YAML file, or the shipped one of a name in :data:`OTHERS`.

    A table may say ``extends: FILE``, a file beside it: what it does not say itself is taken from
    there, and its commands under ``prepare`` stand after those of that file.

    Raises:
        ConfigError: not such a table. UnknownNameError: a claim about no method of it.
    """
    if str(path) in OTHERS:
        path = SHIPPED.with_name(f"{path}.yaml")
    return from_dict(Table, _extended(Path(path)))


def _extended(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file says, over what it extends; ``above`` are the files that extend it."""
    own = load_yaml(path)
    if "extends" not in own:
        return own
    base = path.with_name(str(own.pop("extends")))
    if base in (*above, path):
        raise ConfigError(f"{path} extends {base.name}, which extends it in turn")
    taken = _extended(base, (*above, path))
    prepare = {**taken.get("prepare", {}), **own.get("prepare", {})}
    return {**taken, **own, "prepare": prepare}


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
        prepare = {n: (*c, *dials.prepare.get(n, ())) for n, c in table.prepare.items()}
        table = replace(
            table, nfe=dials.nfe, points=dials.points, seeds=dials.seeds, last=last,
            prepare=prepare,
        )  # fmt: skip
        methods = methods or dials.methods
    for name in methods:
        if name not in table.methods:
            raise unknown("method", name, table.methods)
    wanted = tuple(dict.fromkeys(methods)) or tuple(table.methods)
    needed = {made for name in wanted for made in table.needs(name)}
    return replace(
        table,
        nfe=nfe or table.nfe,
        seeds=tuple(seeds) or table.seeds,
        reference=table.reference if table.reference in wanted else wanted[0],
        methods={name: table.methods[name] for name in wanted},
        prepare={name: table.prepare[name] for name in table.prepare if name in needed},
        claims=tuple(c for c in table.claims if {c["better"], c["than"]} <= set(wanted)),
        short=None,
    )
