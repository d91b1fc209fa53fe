"""Reference statistics: what a reward says about samples of the policy before any training.

Made by ``mmalign calibrate`` and read by the compositions that put rewards on one scale.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmalign.runtime.files import atomic_write_text
from mmalign.types import Score

FORMAT = 1


class CalibrationError(ValueError):
    """A reference file that is unusable or belongs to another reward."""


@dataclass(frozen=True)
class Reference:
    """Values of one reward on reference samples.

    Attributes:
        reward: identity of the reward that made them.
        values: one number a sample, in any order.
        prompts: the same values by prompt.
    """

    reward: str
    values: tuple[float, ...]
    prompts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            raise CalibrationError(
                f"reference values of {self.reward!r} must be at least 2 finite numbers, got "
                f"{len(self.values)}"
            )

    @staticmethod
    def of(score: Score, prompts: Sequence[str]) -> Reference:
        """The scored samples of ``score``; unscored ones are left out."""
        by_prompt: dict[str, list[float]] = {}
        for prompt, value, ok in zip(
            prompts, score.value.tolist(), score.valid.tolist(), strict=True
        ):
            if ok:
                by_prompt.setdefault(prompt, []).append(value)
        every = tuple(v for values in by_prompt.values() for v in values)
        return Reference(score.identity, every, {p: tuple(v) for p, v in by_prompt.items()})

    @staticmethod
    def load(path: str | Path) -> Reference:
        """Read a file of :meth:`save`.

        Raises:
            CalibrationError: not such a file. FileNotFoundError: nothing there.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data.get("format") != FORMAT:
                raise ValueError(f"format {data.get('format')!r}, expected {FORMAT}")
            prompts = {p: tuple(map(float, v)) for p, v in data["prompts"].items()}
            values = tuple(v for part in prompts.values() for v in part)
            return Reference(str(data["reward"]), values, prompts)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(
                f"{path} is no reference file ({error}); make one with 'mmalign calibrate'"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        data = {
            "format": FORMAT,
            "reward": self.reward,
            "count": len(self.values),
            "mean": self.mean,
            "std": self.std,
            "prompts": {p: list(v) for p, v in self.prompts.items()},
        }
        atomic_write_text(path, json.dumps(data, indent=1) + "\n")

    def check(self, identity: str) -> None:
        """Refuse to calibrate another reward than the one that made the values."""
        if identity != self.reward:
            raise CalibrationError(
                f"the reference values were made by {self.reward!r}, not by {identity!r}; "
                "make them again with 'mmalign calibrate'"
            )

    @property
    def mean(self) -> float:
        """Mean over all samples."""
        return sum(self.values) / len(self.values)

    @property
    def std(self) -> float:
        """Population deviation over all samples."""
        mean = self.mean
        return math.sqrt(sum((v - mean) ** 2 for v in self.values) / len(self.values))

    @property
    def digest(self) -> str:
        """Short hash of everything that changes scores."""
        rows = repr((self.reward, sorted(self.values), sorted(self.prompts.items())))
        return hashlib.sha256(rows.encode()).hexdigest()[:10]

    def samples(self, prompt: str, at_least: int = 1) -> tuple[float, ...]:
        """The prompt's own values where there are enough of them, else all."""
        own = self.prompts.get(prompt, ())
        return own if len(own) >= at_least else self.values

    def quantile(self, q: float, prompt: str | None = None, at_least: int = 1) -> float:
        """Quantile, linearly interpolated, of a prompt's values or of all."""
        values = self.values if prompt is None else self.samples(prompt, at_least)
        return float(torch.tensor(values, dtype=torch.float64).quantile(q))

    def cdf(self, value: Tensor) -> Tensor:
        """Share of reference values below ``value``, in [0, 1], piecewise linear between them."""
        grid, share = self._grid(value)
        at = torch.searchsorted(grid, value.detach().contiguous()).clamp(1, len(grid) - 1)
        low, high = grid[at - 1], grid[at]
        inside = ((value - low) / (high - low)).clamp(0, 1)
        return share[at - 1] + inside * (share[at] - share[at - 1])

    def _grid(self, like: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.tensor(self.values, dtype=like.dtype, device=like.device)
        grid, counts = values.unique(return_counts=True)
        if len(grid) < 2:
            raise CalibrationError(
                f"all {len(values)} reference values of {self.reward!r} are {grid[0].item():g}: "
                "there is no scale in them"
            )
        # Equal values share the middle of their ranks; the ends are 0 and 1.
        middle = counts.cumsum(0) - counts / 2 - 0.5
        share = (middle - middle[0]) / (middle[-1] - middle[0])
        return grid, share
