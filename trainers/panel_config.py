"""The recipe's section ``panel``: what is watched beside the trained reward, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmalign.config import ConfigError
from mmalign.registry import unknown

Side = Literal["low", "high", "both"]
Bounds = Mapping[str, float]

# Every rule, and the interval its bound may lie in: deviations, shares, correlations, budgets.
RULES: Mapping[str, tuple[float, float]] = {
    "hacking": (0.0, float("inf")),
    "judge_drop": (0.0, float("inf")),
    "diversity": (0.0, 1.0),
    "probe": (0.0, float("inf")),
    "correlation": (-1.0, 1.0),
    "kl": (0.0, float("inf")),
    "velocity": (0.0, float("inf")),
}
SHAPES_PROBES: Mapping[str, Side] = {"shapes_artifact": "low"}
PIXEL_PROBES: Mapping[str, Side] = {"sharpness": "both", "saturation": "both", "grid_energy": "low"}


def _default_flags() -> Bounds:
    return {"hacking": 0.1, "diversity": 0.7, "probe": 0.5, "correlation": 0.0}


@dataclass(frozen=True, kw_only=True)
class PanelConfig:
    """What is measured on the same held-out pictures at step 0, every so many steps and at the end.

    Attributes:
        judges: rewards that are not trained on.
        every: steps between looks; 0 looks at the start and at the end only.
        prompts, samples: held-out prompts, and pictures of each, with fixed noise.
        source: a file of held-out prompts; empty takes the shapes world's validation split.
        probes: rewards whose leaving of their starting range is a warning, and on which side;
            ``None`` is ``shapes_artifact`` in the shapes world, else statistics of the pixels.
        diversity: the embedder of within-prompt distances: a reward on an embedding model, a
            checkpoint, ``off``, or ``auto``: ``shapes_clip`` in the shapes world, else off.
        distance: measure how far predictions are from those of the model before training.
        alpha: chance that a run in which nothing is wrong raises any flag at all.
        flags: rule to bound; see :mod:`trainers.panel_flags`.
        stop_when: rules at which the run stops: names among ``flags``, or rule to bound.
        best: what the kept model is chosen by: ``reward``, the trained one, or the name of a judge.
            The model of the look with the highest mean is evaluated and exported at the end in the
            place of the last. Empty keeps the last.
        patience: the run stops after so many looks in a row without a higher mean; 0 never.
    """

    judges: tuple[str | Mapping[str, Any], ...] = ()
    every: int = 10
    prompts: int = 32
    samples: int = 4
    source: str = ""
    probes: Mapping[str, Side] | None = None
    diversity: str = "auto"
    distance: bool = True
    alpha: float = 0.05
    flags: Bounds = field(default_factory=_default_flags)
    stop_when: tuple[str, ...] | Bounds = ()
    best: str = ""
    patience: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("prompts", 4), ("samples", 2), ("patience", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"panel.{name} is {getattr(self, name)}; it must be at least {least}"
                )
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"panel.alpha is {self.alpha}; it must lie between 0 and 0.5")
        if self.patience and not self.best:
            raise ConfigError(
                f"panel.patience is {self.patience}, but panel.best does not say by what looks are "
                "compared; set it to reward, or to the name of a judge"
            )
        _check_bounds("flags", self.flags)
        _check_bounds("stop_when", self.stopping)
        if self.needs_judges and not self.judges:
            named = ", ".join(sorted({"hacking", "judge_drop", "correlation"} & {*self.stopping}))
            raise ConfigError(
                f"panel.stop_when names {named}, but panel.judges is empty; name a reward there "
                "that is not trained on"
            )

    @property
    def stopping(self) -> Bounds:
        """Rules at which the run stops, with their bounds."""
        if isinstance(self.stop_when, Mapping):
            return self.stop_when
        missing = [n for n in self.stop_when if n not in self.flags]
        if missing:
            raise ConfigError(
                f"panel.stop_when lists {missing[0]!r}, which panel.flags gives no bound for; "
                f"write it as stop_when: {{{missing[0]}: <bound>}}. Flags with a bound: "
                f"{', '.join(self.flags) or 'none'}"
            )
        return {n: self.flags[n] for n in self.stop_when}

    @property
    def needs_judges(self) -> bool:
        """Whether a rule to stop at would never be decided without judges."""
        return bool({"hacking", "judge_drop", "correlation"} & {*self.stopping})

    def planned_looks(self, steps: int) -> int:
        """Looks in the next ``steps`` steps, the one at their end included."""
        return -(-steps // self.every) if self.every else int(steps > 0)


def _check_bounds(section: str, bounds: Bounds) -> None:
    for name, bound in bounds.items():
        if name not in RULES:
            raise unknown(f"rule in panel.{section}", name, RULES)
        low, high = RULES[name]
        if not low <= bound <= high:
            raise ConfigError(
                f"panel.{section}.{name} is {bound}; it must lie in [{low:g}, {high:g}]"
            )
