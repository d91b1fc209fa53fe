"""The table of what is compared: models, methods, budgets, claims; see ``methods.yaml``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmalign.config import ConfigError, from_dict, load_yaml
from mmalign.registry import unknown

SHIPPED = Path(__file__).with_name("methods.yaml")
LONGEST_TITLE = 22
AT = ("end", "equal_nfe", "equal_time")
TUNED = "tuned"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A generator and its sampler; ``policy`` is empty where it has to be given."""

    policy: str
    steps: int
    guidance_scale: float
    lora: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A steering method on a model; without ``method`` the model as it is.

    Attributes:
        options: of the method, large enough for any budget to be what ends it.
        for_reward: further options, by the name of the reward that steers.
        sizes: options with one value for each budget.
        budgets: network evaluations of a prompt; the table's where empty.
        gradient: it needs a reward that has one, and is left out otherwise.
        beside: the row it is drawn beside and compared with; the table's reference where empty.
        control: the other side of a claim.
    """

    title: str
    method: str = ""
    model: str = "base"
    options: Mapping[str, Any] = field(default_factory=dict)
    for_reward: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    budgets: tuple[int, ...] = ()
    gradient: bool = False
    beside: str = ""
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
    """What the rehearsal changes, of every row and model."""

    seeds: tuple[int, ...]
    prompts_per_task: int
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    steps: int


@dataclass(frozen=True, kw_only=True)
class Table:
    """The whole comparison.

    ``claims`` are read by whoever decides them. Of the ``judges`` the one that steers is dropped.
    """

    reward: str
    seeds: tuple[int, ...]
    prompts_per_task: int
    budgets: tuple[int, ...]
    reference: str
    models: Mapping[str, Model]
    methods: Mapping[str, Row]
    judges: tuple[str, ...] = ()
    claims: tuple[Mapping[str, Any], ...] = ()
    short: Short | None = None

    def __post_init__(self) -> None:
        if self.prompts_per_task < 1:
            raise ConfigError(f"prompts_per_task is {self.prompts_per_task}; it must be 1 or more")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds are {list(self.seeds)}; give one or more, each once")
        self._check_names()
        for name, row in self.methods.items():
            self._check_budgets(name, row)

    def _check_names(self) -> None:
        named = (self.reference, *(self.short.methods if self.short else ()))
        _known(named, self.methods, "method")
        _known((r.beside for r in self.methods.values() if r.beside), self.methods, "method")
        _known((r.model for r in self.methods.values()), self.models, "model")
        for claim in self.claims:
            _known((str(claim.get(s)) for s in ("better", "than")), self.methods, "method")
            if claim.get("at", "end") not in AT:
                raise unknown("at", str(claim["at"]), AT)

    def _check_budgets(self, name: str, row: Row) -> None:
        budgets = self.budgets_of(row)
        if list(budgets) != sorted(set(budgets)) or any(b < 1 for b in budgets):
            raise ConfigError(f"method {name}: budgets {list(budgets)} must rise from 1 or more")
        for option, values in row.sizes.items():
            if len(values) != len(budgets):
                raise ConfigError(
                    f"method {name}: sizes has {len(values)} values of {option} for "
                    f"{len(budgets)} budgets; give one for each"
                )

    def budgets_of(self, row: Row) -> tuple[int, ...]:
        """Network evaluations of a prompt, point by point."""
        return (row.budgets or self.budgets) if row.method else ()


def read_table(path: str | Path = SHIPPED) -> Table:
    """The table in a YAML file.

    Raises:
        ConfigError: not such a table. UnknownNameError: a name that it does not have.
    """
    return from_dict(Table, load_yaml(path))


def choose(
    table: Table,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    reward: str = "",
    tuned: str = "",
    short: bool = False,
) -> Table:
    """The table restricted to some methods or seeds, with another reward; empty leaves it.

    Args:
        tuned: folder of a pipeline, or of a LoRA for the base.

    Raises:
        UnknownNameError: no such method. ConfigError: no such rehearsal, no such folder, or
            impossible numbers.
    """
    if short:
        if table.short is None:
            raise ConfigError("this table has no section 'short'")
        methods = methods or table.short.methods
        table = _shortened(table, table.short)
    _known(methods, table.methods, "method")
    wanted = tuple(dict.fromkeys(methods)) or tuple(table.methods)
    models = dict(table.models)
    if tuned:
        models[TUNED] = _tuned(table, tuned)
    name = reward or table.reward
    kept = {n: _beside(table.methods[n], wanted) for n in wanted}
    claims = [c for c in table.claims if {c["better"], c["than"]} <= set(wanted)]
    return replace(
        table,
        reward=name,
        judges=tuple(j for j in table.judges if j != name.removeprefix("shapes_") and j != name),
        seeds=tuple(seeds) or table.seeds,
        reference=table.reference if table.reference in wanted else wanted[0],
        models=models,
        methods=kept,
        claims=tuple({**c, "measure": name} if c.get("measure") == "reward" else c for c in claims),
        short=None,
    )


def _beside(row: Row, wanted: Sequence[str]) -> Row:
    return row if row.beside in wanted else replace(row, beside="")


def _shortened(table: Table, dials: Short) -> Table:
    rows = {n: replace(r, budgets=(), sizes={}) for n, r in table.methods.items()}
    models = {n: replace(m, steps=dials.steps, guidance_scale=1.0) for n, m in table.models.items()}
    return replace(
        table, methods=rows, models=models, seeds=dials.seeds, budgets=dials.budgets,
        prompts_per_task=dials.prompts_per_task,
    )  # fmt: skip


def _tuned(table: Table, given: str) -> Model:
    """The tuned model: a pipeline of its own, or the base with a LoRA."""
    if TUNED not in table.models:
        raise ConfigError(f"--tuned {given}: this table has no model called {TUNED}")
    folder = Path(given)
    if not folder.exists():
        raise ConfigError(
            f"--tuned {given}: there is no such folder; give that of a pipeline, or of a LoRA "
            "such as runs/first/lora"
        )
    if (folder / "model_index.json").is_file():
        return replace(table.models[TUNED], policy=given)
    base = next(iter(table.models.values()))
    return replace(table.models[TUNED], policy=base.policy, lora=given)


def _known(names: Iterable[str], known: Iterable[str], kind: str) -> None:
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
