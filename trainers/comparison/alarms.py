"""How often the panels of a comparison raised a flag: false alarms of one row, finds of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from scipy.special import betaincinv

from mmalign.runtime.log import read_jsonl
from trainers.comparison.runner import ENDED
from trainers.panel import FILE


@dataclass(frozen=True)
class Alarms:
    """The flags of one row.

    Attributes:
        runs, flagged: that have ended, and those of them in which any flag was raised.
        steps: of the first look with a flag, in each of the latter.
        rules: how many runs raised each rule, at any look.
    """

    method: str
    runs: int
    steps: tuple[int, ...]
    rules: Mapping[str, int]

    @property
    def flagged(self) -> int:
        """Runs with a flag."""
        return len(self.steps)

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval of the share of runs with a flag (Clopper and Pearson)."""
        n, k = self.runs, self.flagged
        low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, 0.025))
        return low, 1.0 if k == n else float(betaincinv(k + 1, n - k, 0.975))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "method": self.method, "runs": self.runs, "flagged": self.flagged,
            "interval": list(self.interval), "first_steps": list(self.steps),
            "rules": dict(self.rules),
        }  # fmt: skip

    def cells(self) -> tuple[str, ...]:
        """A row of the table under :data:`HEAD`."""
        if not self.runs:
            return (self.method, "0", "-", "-", "-", "-")
        low, high = (100 * end for end in self.interval)
        when = f"{median(self.steps):g}" if self.steps else "-"
        rules = ", ".join(f"{name} ({count})" for name, count in self.rules.items()) or "-"
        share = f"{100 * self.flagged / self.runs:.0f} %"
        return (self.method, f"{self.runs}", share, f"[{low:.0f}, {high:.0f}]", when, rules)


HEAD = ("row", "runs", "with a flag", "95 % interval", "first at step", "rules (runs)")


def alarms(record: Mapping[str, Any], out: Path) -> list[Alarms]:
    """Of every row of a comparison's record, from the panels of its runs."""
    found = []
    for method in record["methods"]:
        own = [r for r in record["runs"] if r["method"] == method and r["state"] in ENDED]
        found.append(_of(method, [read_jsonl(out / r["folder"] / FILE) for r in own]))
    return found


def _of(method: str, runs: Sequence[Sequence[Mapping[str, Any]]]) -> Alarms:
    steps, rules = [], Counter[str]()
    for rows in runs:
        at = [int(row["step"]) for row in rows if row["flags"]]
        steps += at[:1]
        rules.update({test["rule"] for row in rows for test in row["tests"] if test["raised"]})
    ranked = sorted(rules.items(), key=lambda rule: (-rule[1], rule[0]))
    return Alarms(method, len(runs), tuple(steps), dict(ranked))
