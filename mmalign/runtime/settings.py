"""Output folders remember what they were made with, so that two runs are never mixed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.runtime.files import atomic_write_bytes


class SettingsMismatchError(ValueError):
    """The folder holds results that were made, or judged, in another way."""


def agree(folder: Path, settings: Mapping[str, Any], what: str) -> None:
    """Write ``settings.json`` into ``folder``, or check that it holds the same already.

    Args:
        settings: plain data.
        what: the folder holds, as in ``an evaluation``; for the message.

    Raises:
        SettingsMismatchError: it holds other settings, which are named, or cannot be read.
    """
    path = folder / "settings.json"
    if not path.exists():
        text = json.dumps(dict(settings), indent=1, ensure_ascii=False)
        atomic_write_bytes(path, text.encode())
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{path} cannot be read ({error}); use another folder"
        raise SettingsMismatchError(message) from None
    wanted = json.loads(json.dumps(dict(settings)))  # tuples and the like as JSON sees them
    odd = [k for k in sorted(stored.keys() | wanted.keys()) if stored.get(k) != wanted.get(k)]
    if odd:
        said = "; ".join(f"{k}: {stored.get(k)!r} there, {wanted.get(k)!r} now" for k in odd)
        raise SettingsMismatchError(
            f"{folder} holds {what} made with other settings ({said}). Two runs are never "
            "mixed: use another folder, or delete this one."
        )
