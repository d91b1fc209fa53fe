"""Rewards made of rewards: a composition is itself a reward model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mmalign.registry import unknown
from vision_rewards.compositions.base import Components, Composition
from vision_rewards.compositions.combine import Ensemble, Gate, Minimum, Separate, WeightedSum
from vision_rewards.compositions.frames import Frames
from vision_rewards.compositions.groups import GroupRank, Pareto
from vision_rewards.compositions.reference import CalibrationError, Reference
from vision_rewards.compositions.transform import Calibrated, LogSigmoid, Sigmoid
from vision_rewards.compositions.win_rate import WinRate

KINDS: dict[str, type[Composition]] = {
    cls.kind: cls
    for cls in (
        WeightedSum,
        Separate,
        Gate,
        Minimum,
        Ensemble,
        Calibrated,
        LogSigmoid,
        Sigmoid,
        GroupRank,
        Pareto,
        WinRate,
        Frames,
    )
}


def build(kind: str, components: Components, options: Mapping[str, Any]) -> Composition:
    """The composition ``{"compose": kind, "parts": ..., option: value}`` stands for.

    Raises:
        UnknownNameError: unknown kind or option; names the nearest.
        ValueError: options or parts that make no sense together.
    """
    if kind not in KINDS:
        raise unknown("composition", str(kind), KINDS)
    cls = KINDS[kind]
    known = [n for n in inspect.signature(cls.__init__).parameters if n not in _OWN]
    for option in options:
        if option not in known:
            raise unknown(f"option of composition {kind!r}", option, known)
    missing = [n for n, p in inspect.signature(cls.__init__).parameters.items()
               if n in known and p.default is p.empty and n not in options]  # fmt: skip
    if missing:
        raise ValueError(f"composition {kind!r} needs {', '.join(missing)}")
    return cls(components, **options)


_OWN = ("self", "components")

__all__ = [
    "KINDS",
    "CalibrationError",
    "Calibrated",
    "Composition",
    "Ensemble",
    "Frames",
    "Gate",
    "GroupRank",
    "LogSigmoid",
    "Minimum",
    "Pareto",
    "Reference",
    "Separate",
    "Sigmoid",
    "WeightedSum",
    "WinRate",
    "build",
]
