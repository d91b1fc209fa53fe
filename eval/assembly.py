"""An assembly line: batches are made, judged and kept at the same time.

Making stays on the caller's thread, so that what the network computes does not depend on the line
around it.  Judging and keeping each have a thread of their own, and at most :data:`AHEAD` batches
are under way, so that memory stays bounded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

AHEAD = 2
Item = TypeVar("Item")
Kept = TypeVar("Kept")


def assembly_line(
    items: Iterable[Item],
    make: Callable[[Item], Any],
    judge: Callable[[Item, Any], Any],
    keep: Callable[[Item, Any, float], Kept],
) -> Iterator[Kept]:
    """What ``keep(item, judge(item, make(item)), seconds)`` gives, in order.

    ``seconds`` is the time since the batch before was kept, so that they add up to the whole. An
    error, an interruption included, comes after everything made before it has been kept.
    """
    last = time.monotonic()

    def kept(item: Item, judged: Any) -> Kept:
        nonlocal last
        now = time.monotonic()
        spent, last = now - last, now
        return keep(item, judged, spent)

    threads = torch.get_num_threads()  # a new thread would take all cores, and round otherwise
    judging = ThreadPoolExecutor(1, "judge", torch.set_num_threads, (threads,))
    keeping = ThreadPoolExecutor(1, "keep")

    def judged(item: Item, made: Any) -> Future[Kept]:
        with torch.no_grad():
            return keeping.submit(kept, item, judge(item, made))

    waiting: deque[Future[Future[Kept]]] = deque()
    with keeping, judging:  # leaving waits for what is under way
        try:
            for item in items:
                waiting.append(judging.submit(judged, item, make(item)))
                while len(waiting) > AHEAD:
                    yield waiting.popleft().result().result()
            while waiting:
                yield waiting.popleft().result().result()
        except BaseException:
            _settle(waiting)
            raise


def _settle(waiting: Iterable[Future[Future[Any]]]) -> None:
    """Let batches under way be kept, in order, up to the first that failed."""
    for future in waiting:
        if future.exception() is not None or future.result().exception() is not None:
            return
