"""Steering: better samples at inference time, no weights touched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mmalign.protocols import Steerer
from mmalign.registry import STEERERS, unknown
from mmalign.steering.best_of_n import BestOfN
from mmalign.steering.budget import Budget, BudgetError
from mmalign.steering.fk import Fk
from mmalign.steering.pipelines import steer_pipeline
from mmalign.steering.stock import Controller, StepState, steered
from mmalign.steering.svdd import Svdd


def build_steerer(
    method: str | Steerer, seed: int | None = None, options: Mapping[str, Any] | None = None
) -> Steerer:
    """A steering method by registered name and options; an object is returned as it is.

    Raises:
        UnknownNameError: unknown name or option; names the nearest.
        ValueError: options beside an object, or a value that the method refuses.
    """
    options = options or {}
    if not isinstance(method, str):
        given = [*options, *(["seed"] if seed is not None else [])]
        if given:
            raise ValueError(f"{', '.join(given)}: set it in the method object itself")
        return method
    cls = STEERERS.load(method)
    known = inspect.signature(cls).parameters
    for name in options:
        if name not in known:
            raise unknown(f"option of steering method {method!r}:", name, known)
    return cls(seed=seed or 0, **options)  # type: ignore[no-any-return]


__all__ = [
    "BestOfN",
    "Budget",
    "BudgetError",
    "Controller",
    "Fk",
    "StepState",
    "Svdd",
    "build_steerer",
    "steer_pipeline",
    "steered",
]
