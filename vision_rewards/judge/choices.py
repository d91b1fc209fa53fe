"""Probabilities of answers: from tokens and their log-probabilities to ``P(yes)``.

A word has several tokens (``Yes``, ``yes``, `` YES``); its probability is the sum over all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

# Of SentencePiece and byte-level BPE, whose newline and tab are letters of their own.
_SPACE_MARKS = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n", "ĉ": "\t"})


def canonical(token: str) -> str:
    """A token without leading or trailing space and without case."""
    return token.translate(_SPACE_MARKS).strip().casefold()


def log_sum(values: Sequence[float]) -> float:
    """``log sum exp`` of natural logarithms; ``-inf`` of nothing."""
    top = max(values, default=-math.inf)
    if math.isinf(top):
        return top
    return top + math.log(sum(math.exp(v - top) for v in values))


def gather_choices(
    tokens: Iterable[tuple[str, float]], choices: Sequence[str]
) -> dict[str, float] | None:
    """Log-probability of each choice among likely tokens and their log-probabilities.

    ``None`` where no choice is among them; ``-inf`` for one that is missing beside another.
    """
    found: dict[str, list[float]] = {canonical(c): [] for c in choices}
    for token, log_prob in tokens:
        if canonical(token) in found:
            found[canonical(token)].append(log_prob)
    if not any(found.values()):
        return None
    return {c: log_sum(found[canonical(c)]) for c in choices}


def verdict_index(tokens: Sequence[str], marker: str) -> int | None:
    """Which token of an answer holds the verdict.

    The first one without a marker; otherwise the first token with a letter or digit after the
    last match of the regular expression ``marker``, so that it is found wherever the reasoning
    ends, behind quotes and line breaks. ``None`` where the marker or anything after it is missing.
    """
    if not marker:
        return 0 if tokens else None
    tokens = [t.translate(_SPACE_MARKS).replace("<0x0A>", "\n") for t in tokens]
    text = "".join(tokens)
    ends = [m.end() for m in re.finditer(marker, text)]
    if not ends:
        return None
    start = 0
    for index, token in enumerate(tokens):
        stop = start + len(token)
        if re.search(r"[^\W_]", text[max(start, ends[-1]) : stop]):
            return index
        start = stop
    return None


def normalised(log_probs: Mapping[str, float], choice: str) -> float:
    """``p(choice) / sum of all choices``, in [0, 1]; NaN where all are impossible."""
    total = log_sum(list(log_probs.values()))
    return math.nan if math.isinf(total) else math.exp(log_probs[choice] - total)
