"""Reads the folder of a training run, whatever state it is in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from eval.result import EvalResult


@dataclass(frozen=True)
class RunFolder:
    """What a training run has written so far.

    Attributes:
        path: the folder.
        config: text of ``config.yaml``; empty where missing.
        run: ``run.json``; empty where missing.
        metrics: numeric columns of ``metrics.jsonl``, each as long as the log, NaN where a line
            lacks the key.
        before, after: evaluations around the training; ``None`` where missing.
        problems: what was there and could not be read.
    """

    path: Path
    config: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    before: EvalResult | None = None
    after: EvalResult | None = None
    problems: tuple[str, ...] = ()

    @property
    def steps(self) -> list[float]:
        """The update each line of the log belongs to; line numbers where ``step`` is not logged."""
        logged = self.metrics.get("step", [])
        if logged and all(math.isfinite(s) for s in logged):
            return list(logged)
        return [float(i) for i in range(self.updates)]

    @property
    def updates(self) -> int:
        """Lines in the log."""
        return max((len(c) for c in self.metrics.values()), default=0)

    def column(self, *names: str) -> list[float]:
        """The first of these columns that was logged, or an empty list."""
        return next((self.metrics[n] for n in names if n in self.metrics), [])

    def total(self, name: str) -> float | None:
        """A total from ``run.json``, else summed (``nfe``) or last (``seconds``) in the log."""
        stated = self.run.get(name)
        if isinstance(stated, (int, float)) and not isinstance(stated, bool):
            return float(stated)
        logged = [v for v in self.metrics.get(name, []) if math.isfinite(v)]
        if not logged:
            return None
        # A column that never falls is a running total; one that does is spent at each update.
        rising = all(a <= b for a, b in pairwise(logged))
        constant = logged[0] == logged[-1] and len(logged) > 1
        return logged[-1] if rising and not constant else sum(logged)


def read_run(path: Path) -> RunFolder:
    """Read ``config.yaml``, ``run.json``, ``metrics.jsonl`` and ``eval/{before,after}``.

    Missing pieces stay empty; unreadable ones are named in ``problems``.

    Raises:
        FileNotFoundError: ``path`` is not a folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give the folder of a training run")
    problems: list[str] = []
    config = path / "config.yaml"
    return RunFolder(
        path=path,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        run=_json(path / "run.json", problems),
        metrics=_metrics(path / "metrics.jsonl", problems),
        before=_result(path / "eval" / "before" / "result.json", problems),
        after=_result(path / "eval" / "after" / "result.json", problems),
        problems=tuple(problems),
    )


def _json(path: Path, problems: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path.name} is not valid JSON ({error})")
        return {}
    if not isinstance(data, dict):
        problems.append(f"{path.name} holds a {type(data).__name__}, not an object")
        return {}
    return data


def _metrics(path: Path, problems: list[str]) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [r for r in map(_object, lines) if r is not None]
    torn = sum(bool(ln.strip()) for ln in lines) - len(rows)
    if torn:
        problems.append(f"{torn} unreadable line(s) of {path.name} left out")
    names = dict.fromkeys(k for r in rows for k, v in r.items() if _numeric(v))
    return {n: [float(r[n]) if _numeric(r.get(n)) else math.nan for r in rows] for n in names}


def _object(line: str) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _numeric(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _result(path: Path, problems: list[str]) -> EvalResult | None:
    if not path.is_file():
        return None
    try:
        return EvalResult.load(path)
    except (ValueError, TypeError, KeyError) as error:
        problems.append(f"{path.parent.name}/{path.name} cannot be read ({error})")
        return None
