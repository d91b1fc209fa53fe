"""From a name and options to a benchmark."""

from __future__ import annotations

import inspect
from typing import Any

from mmalign.registry import BENCHMARKS, unknown


def load_benchmark(benchmark: Any, **options: Any) -> Any:
    """The benchmark of a registered name, with its options; an object is returned as it is.

    Args:
        benchmark: a name of ``mmalign list benchmarks``, or a benchmark.
        options: the benchmark's own, such as ``data``, ``mode``, ``samples_per_prompt``; those
            that are ``None`` are left to it.

    Raises:
        UnknownNameError: an unknown benchmark or option; names the nearest.
        ValueError: options beside an object, or unusable ones.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not isinstance(benchmark, str):
        if given:
            said = ", ".join(given)
            raise ValueError(f"{said} belong to the benchmark object: set them there")
        return benchmark
    cls = BENCHMARKS.load(benchmark)
    known = _options_of(cls)
    for option in given:
        if option not in known:
            raise unknown(f"option of benchmark {benchmark!r}", option, known)
    return cls(**given)


def _options_of(cls: type) -> list[str]:
    """Names of what a class takes, those it hands on to its base included."""
    names: list[str] = []
    for one in cls.__mro__:
        if "__init__" in vars(one):
            parameters = inspect.signature(one).parameters.values()
            names += [
                p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD
            ]
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return names
