"""Rubrics: what a picture is judged by, as data in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.assets import asset
from mmalign.config import ConfigError, from_dict
from vision_rewards.judge.parsing import exactly, number_in, text_in


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One thing to look at.

    Attributes:
        name: one word, the key in the judge's answer.
        description: what to look at, for the judge.
        weight: share in the total, above 0.
        scale: lowest and highest score.
        levels: what single scores mean, for the judge.
        optional: the judge may answer ``null`` where the criterion does not apply; it is then
            left out of the total.
    """

    name: str
    description: str
    weight: float = 1.0
    scale: tuple[float, float] = (1.0, 5.0)
    levels: Mapping[int, str] = field(default_factory=dict)
    optional: bool = False

    def __post_init__(self) -> None:
        low, high = self.scale
        if not self.name.isidentifier():
            raise ConfigError(f"criterion {self.name!r} must be named by one word")
        if not self.weight > 0:
            raise ConfigError(f"criterion {self.name!r} has weight {self.weight}; it must be > 0")
        if not low < high:
            raise ConfigError(f"criterion {self.name!r} has scale {self.scale}; it must ascend")
        outside = [level for level in self.levels if not low <= level <= high]
        if outside:
            raise ConfigError(f"criterion {self.name!r} describes {outside[0]}, off its scale")

    def text(self) -> str:
        """The criterion as the judge reads it."""
        low, high = self.scale
        null = ", or null if it does not apply" if self.optional else ""
        lines = [f'- "{self.name}" ({low:g} = worst to {high:g} = best{null}): {self.description}']
        lines += [f"    {level:g}: {what}" for level, what in sorted(self.levels.items())]
        return "\n".join(lines)

    def normalised(self, score: float) -> float:
        """A score of the scale in [0, 1]."""
        low, high = self.scale
        return (score - low) / (high - low)


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """Criteria with weights; the total is their weighted mean in [0, 1].

    Raises:
        ConfigError: no criterion, or two of one name.
    """

    name: str
    criteria: tuple[Criterion, ...]
    version: int = 1
    summary: str = ""

    def __post_init__(self) -> None:
        names = [c.name for c in self.criteria]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"rubric {self.name!r} needs criteria of different names: {names}")

    def text(self) -> str:
        """Every criterion as the judge reads it."""
        return "\n".join(c.text() for c in self.criteria)

    def form(self) -> str:
        """The JSON that the judge is to fill in."""
        rows = [f'  "{c.name}": {{"reason": "...", "score": ...}}' for c in self.criteria]
        return "{\n" + ",\n".join(rows) + "\n}"

    def read(self, record: Mapping[str, Any]) -> dict[str, tuple[float | None, str]]:
        """Score and reason of every criterion in a judge's answer; ``None`` for not applicable.

        Raises:
            UnreadableError: a criterion is missing, unknown, without reason or off its scale.
        """
        exactly(record, [c.name for c in self.criteria], "the answer")
        read: dict[str, tuple[float | None, str]] = {}
        for c in self.criteria:
            entry = exactly(record[c.name], ["reason", "score"], f"{c.name!r}")
            reason = text_in(entry["reason"], f"the reason of {c.name!r}")
            if entry["score"] is None and c.optional:
                read[c.name] = None, reason
            else:
                read[c.name] = number_in(entry["score"], *c.scale, f"score {c.name!r}"), reason
        return read

    def total(self, scores: Mapping[str, float | None]) -> float:
        """Weighted mean of the normalised scores, in [0, 1]; NaN where none applies."""
        given = [(c, s) for c in self.criteria if (s := scores[c.name]) is not None]
        weight = sum(c.weight for c, _ in given)
        if not weight:
            return float("nan")
        return sum(c.weight * c.normalised(s) for c, s in given) / weight


def load_rubric(rubric: Rubric | str | Path) -> Rubric:
    """A rubric as it is, a shipped one by name, or one from a YAML file.

    Raises:
        AssetError: neither a file nor shipped.
        ConfigError: the file is no rubric; names the key.
    """
    import yaml

    if isinstance(rubric, Rubric):
        return rubric
    path = Path(rubric)
    if not path.is_file():
        path = asset(f"rubrics/{rubric}.yaml")
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"rubric {path} is not YAML: {error}") from error
    return from_dict(Rubric, record, where=path.stem)
