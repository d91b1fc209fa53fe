"""Align text-to-image and text-to-video generators with human and verifiable rewards.

Four verbs: :func:`train`, :func:`steer`, :func:`score`, :func:`evaluate`. They load on first use,
so that importing the package, and asking the command line for help, costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmalign.api import evaluate, score, steer, train

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "score", "steer", "train"]


def __getattr__(name: str) -> Any:
    if name in ("evaluate", "score", "steer", "train"):
        import importlib

        return getattr(importlib.import_module("mmalign.api"), name)
    raise AttributeError(f"module 'mmalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
