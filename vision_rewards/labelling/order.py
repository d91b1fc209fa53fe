"""Who sees which pair when, and on which side: everything follows from a seed and the names.

Each annotator has an order of their own. Nothing is drawn from a running generator, so a restarted
server, or one with more pairs, shows what is left as the first would have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Keyed(Protocol):
    """Something with a name of its own."""

    @property
    def key(self) -> str:
        """The name."""


K = TypeVar("K", bound=Keyed)


class OrderError(ValueError):
    """An order that makes no sense."""


@dataclass(frozen=True)
class Turn:
    """One showing of a pair to one annotator.

    Attributes:
        pair: number of the pair.
        id: what a decision about it is filed under.
        round: 0, or 1 where the pair is shown again.
        swapped: picture b is on the left.
    """

    pair: int
    id: str
    round: int
    swapped: bool


def draw(*words: object) -> int:
    """A number in [0, 2^64) that follows from ``words`` alone."""
    text = "\x1f".join(map(str, words))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def turns(
    pairs: Sequence[K], user: str, *, seed: int = 0, repeat: float = 0.1, swap: bool = True
) -> list[Turn]:
    """Every pair once in an order of ``user``'s own, and some of them again.

    ``round(repeat n)`` pairs of the first half of the order come back, each when about half of all
    pairs lies between: long enough not to remember. Sides are drawn for each showing.

    Raises:
        OrderError: ``repeat`` outside [0, 0.5].
    """
    check_repeat(repeat)
    order = sorted(range(len(pairs)), key=lambda p: draw(seed, user, pairs[p].key))
    n, half = len(order), -(-len(order) // 2)

    def turn(pair: int, round_: int) -> Turn:
        key = pairs[pair].key
        swapped = swap and bool(draw(seed, user, "side", round_, key) % 2)
        return Turn(pair, f"{key}-{round_}-{user}", round_, swapped)

    placed = [(float(i), turn(pair, 0)) for i, pair in enumerate(order)]
    again = sorted(range(half), key=lambda i: draw(seed, user, "again", pairs[order[i]].key))
    for i in again[: round(repeat * n)]:
        key = pairs[order[i]].key
        place = i + half + draw(seed, user, "place", key) % (n - half - i + 1)
        placed.append((place - 0.5, turn(order[i], 1)))
    return [t for _, t in sorted(placed, key=lambda item: (item[0], item[1].id))]


def check_repeat(repeat: float) -> None:
    """Raise :class:`OrderError` where ``repeat`` is no share that can be shown again."""
    if not 0 <= repeat <= 0.5:
        raise OrderError(f"repeat is {repeat}; it must lie in [0, 0.5]: a share shown again later")
