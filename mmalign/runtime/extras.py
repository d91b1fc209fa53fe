"""Optional packages: imported when they are needed, with the fix in the error."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """An optional package is not installed; the message says how to install it."""


def optional(module: str, extra: str, purpose: str) -> Any:
    """Import an optional package.

    Args:
        module: what to import.
        extra: the extra of this project that installs it.
        purpose: what needs it, as the beginning of a sentence.

    Raises:
        MissingExtraError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {module} ({error}); install it: pip install 'mmalign[{extra}]'"
        ) from error
