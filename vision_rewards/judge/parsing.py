"""Reading answers: forgiving about how they are written, strict about what they say.

Code fences, text around the JSON, missing escapes and trailing commas are repaired. A value that
is missing, doubled, of the wrong type or out of range is never repaired: the answer is unreadable.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
_REFUSAL = re.compile(
    r"\b(?:i'?m|i am) (?:very )?(?:sorry|unable)"
    r"|\bi (?:can(?:no|')?t|won'?t|am not able to)"
    r" (?:help|assist|provide|rate|judge|evaluate|comply|fulfil|view|see|analy[sz]e|process)",
    re.IGNORECASE,
)
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"


class UnreadableError(ValueError):
    """An answer that does not say what was asked for; the message says what is wrong with it."""


def looks_refused(text: str) -> bool:
    """Whether an unreadable answer declines to answer."""
    return bool(_REFUSAL.search(text.replace("’", "'")))


def without_thoughts(text: str) -> str:
    """The answer without closed ``<think>`` blocks."""
    return _THINK.sub("", text).strip()


def json_object(text: str) -> dict[str, Any]:
    """The one JSON object of an answer.

    Raises:
        UnreadableError: none, several that differ, a key given twice, or a number that is not
            finite.
    """
    text = without_thoughts(text)
    found = _objects(text)
    if not found:
        raise UnreadableError("there is no JSON object in it")
    if any(other != found[0] for other in found):
        raise UnreadableError("it holds several JSON objects that differ")
    return found[0]


def _objects(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    at = text.find("{")
    while at >= 0:
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError:
            # An inner object of a broken one must not pass for the answer: repair, or give up.
            repaired = repair(text[at : text.rfind("}") + 1])
            try:
                return [*found, _DECODER.decode(repaired)]
            except json.JSONDecodeError as error:
                raise UnreadableError(f"its JSON is broken ({error.msg})") from error
        found.append(value)
        at = text.find("{", end)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [k for k, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UnreadableError(f"its key {key!r} is given twice")
    return dict(pairs)


def _not_finite(constant: str) -> float:
    raise UnreadableError(f"{constant} is no number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_not_finite)


def repair(text: str) -> str:
    """JSON with raw newlines and stray quotes in strings escaped, and trailing commas removed.

    A quote ends a string only where JSON can go on behind it: before ``:``, a closing bracket, the
    end, or a comma that is followed by another value or a closing bracket.
    """
    out: list[str] = []
    inside, at = False, 0
    while at < len(text):
        char = text[at]
        if inside and char == "\\":
            out.append(text[at : at + 2])
            at += 2
            continue
        if char == '"' and (not inside or _ends_string(text, at + 1)):
            inside = not inside
        elif inside:
            char = {'"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char, char)
        elif char == "," and re.match(r"\s*[}\]]", text[at + 1 :]):
            char = ""
        out.append(char)
        at += 1
    return "".join(out)


def _ends_string(text: str, at: int) -> bool:
    rest = text[at:].lstrip()
    if rest[:1] in ("", ":", "}", "]"):
        return True
    return bool(re.match(r',\s*(?:"[^"]*"\s*[:,\]}]|[-\d\[{}\]]|true|false|null)', rest))


def number_in(value: Any, low: float, high: float, what: str) -> float:
    """A finite JSON number within ``[low, high]``.

    Raises:
        UnreadableError: anything else; text and booleans are no numbers.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnreadableError(f"{what} must be a number, got {value!r}")
    if not math.isfinite(value) or not low <= value <= high:
        raise UnreadableError(f"{what} must lie in [{low:g}, {high:g}], got {value!r}")
    return float(value)


def text_in(value: Any, what: str) -> str:
    """A JSON string, stripped. Raises :class:`UnreadableError` for anything else."""
    if not isinstance(value, str):
        raise UnreadableError(f"{what} must be text, got {value!r}")
    return value.strip()


def exactly(record: Any, keys: Sequence[str], what: str) -> Mapping[str, Any]:
    """A mapping with these keys and no others.

    Raises:
        UnreadableError: no mapping, or a key that is missing or not asked for.
    """
    if not isinstance(record, dict):
        raise UnreadableError(f"{what} must be an object, got {record!r}")
    missing, extra = [k for k in keys if k not in record], [k for k in record if k not in keys]
    if missing or extra:
        said = [f"lacks {', '.join(missing)}"] * bool(missing)
        said += [f"has {', '.join(map(repr, extra))}, which was not asked for"] * bool(extra)
        raise UnreadableError(f"{what} {' and '.join(said)}")
    return record


def labelled_number(text: str, label: str, low: float, high: float) -> float:
    """The number behind ``label:``; the last one where it is said more than once.

    ``label`` is a regular expression; asterisks and ``/5`` around the number are ignored.

    Raises:
        UnreadableError: no such line, or a number out of range.
    """
    found = re.findall(rf"{label}\s*\**\s*:\s*\**\s*({NUMBER})", text, re.IGNORECASE)
    if not found:
        raise UnreadableError(f"it has no line like '{label}: <number>'")
    return number_in(float(found[-1]), low, high, label)


def tagged(text: str, tag: str) -> str:
    """What stands in the last ``<tag>...</tag>``. Raises :class:`UnreadableError` without one."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL | re.IGNORECASE)
    if not found:
        raise UnreadableError(f"it has no <{tag}>...</{tag}>")
    return str(found[-1]).strip()


def one_of(text: str, phrases: Mapping[str, float], what: str = "a verdict") -> float:
    """The value of the one phrase that the text contains, without regard to case.

    Raises:
        UnreadableError: none of them, or several with different values.
    """
    flat = " ".join(text.casefold().split())
    said = {value for phrase, value in phrases.items() if _spoken(phrase, flat)}
    if len(said) != 1:
        known = " / ".join(phrases)
        wrong = "does not hold" if not said else "contradicts itself about"
        raise UnreadableError(f"it {wrong} {what} ({known})")
    return said.pop()


def _spoken(phrase: str, flat: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)", flat) is not None


def deduplicated(texts: Iterable[str], overlap: float = 0.8) -> list[str]:
    """Texts without those that share ``overlap`` of their words (Jaccard) with an earlier one."""
    kept: list[tuple[str, set[str]]] = []
    for text in texts:
        words = set(re.findall(r"\w+", text.casefold()))
        if words and all(len(words & w) < overlap * len(words | w) for _, w in kept):
            kept.append((text.strip(), words))
    return [text for text, _ in kept]
