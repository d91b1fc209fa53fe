"""The text form of a reward: ``0.5*pickscore + shapes_partial``, ``name@checkpoint``, paths.

Grammar: terms joined by ``+`` (or, the short form, by ``,``); a term is ``name``, ``weight*name``
or ``name=weight``; a name may be followed by ``@checkpoint``. A file, a folder or a server stands
for itself: ``my.py:score``, ``runs/reward/``, ``remote:http://localhost:8123``.
"""

from __future__ import annotations

import re
from pathlib import Path

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_WEIGHTED = re.compile(rf"^({_NUMBER})\s*\*\s*(.+)$", re.DOTALL)
# A comma before a further replica of a server, and the sign of an exponent, separate nothing.
_COMMA = re.compile(r",(?!\s*https?://)")
_PLUS = re.compile(r"(?<!\d[eE])\+")


class RewardSpecError(ValueError):
    """Text that is no reward: an empty or repeated name, or an unreadable weight."""


def parse_spec(text: str) -> dict[str, float]:
    """``{name: weight}`` of the text form, in its order; weights are 1 where none is given.

    Raises:
        RewardSpecError: an empty or repeated name, or a weight that is not a number.
    """
    _, at, checkpoint = text.partition("@")
    if text and (_exists(text) or (at and _exists(checkpoint))):
        return {text: 1.0}
    weights: dict[str, float] = {}
    for term in _PLUS.split(text) if _PLUS.search(text) else _COMMA.split(text):
        name, weight = _term(term.strip(), text)
        if not name or name in weights:
            raise RewardSpecError(f"reward {text!r}: name {name!r} is empty or given twice")
        weights[name] = weight
    return weights


def split_checkpoint(name: str) -> tuple[str, str | None]:
    """``name@checkpoint`` apart; ``None`` where no checkpoint is named."""
    bare, at, checkpoint = name.partition("@")
    if at and not checkpoint:
        raise RewardSpecError(f"reward {name!r}: no checkpoint after '@'")
    return bare, checkpoint or None


def _term(term: str, text: str) -> tuple[str, float]:
    weighted = _WEIGHTED.match(term)
    if weighted:
        return weighted[2].strip(), float(weighted[1])
    name, star, rest = term.partition("*")
    if star and "/" not in name and not _exists(term):
        raise RewardSpecError(f"reward {text!r}: weight {name.strip()!r} of {rest!r} is no number")
    name, equals, weight = (part.strip() for part in term.partition("="))
    if not equals or "://" in term or "@" in name or _exists(term):
        return term, 1.0
    try:
        return name, float(weight)
    except ValueError as error:
        raise RewardSpecError(f"reward {text!r}: weight {weight!r} is not a number") from error


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long, or characters that no name of a file holds
        return False
