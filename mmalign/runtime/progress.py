"""Progress with time left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from mmalign.runtime.log import say

QUIET_SECONDS = 10.0  # between two lines of a log file


class Advance(Protocol):
    """Called with the number of items just finished and a few words on them."""

    def __call__(self, count: int, text: str = "") -> None: ...


@contextmanager
def track(label: str, total: int, done: int = 0, enabled: bool = True) -> Iterator[Advance]:
    """Follow ``total`` items of which ``done`` were finished before; yields the function to call
    with each newly finished count."""
    if not enabled or total <= done:
        yield lambda count, text="": None
    elif sys.stderr.isatty():
        with _bar(label, total, done) as advance:
            yield advance
    else:
        yield _Lines(label, total, done)


@contextmanager
def _bar(label: str, total: int, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate())
    words = TextColumn("{task.fields[text]}")
    with Progress(*columns, Remaining(), words, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, completed=done, text="")
        yield lambda count, text="": progress.update(task, advance=count, text=text)


class _Lines:
    """One line on standard error at most every :data:`QUIET_SECONDS`, and one at the end."""

    def __init__(self, label: str, total: int, done: int) -> None:
        self.label, self.total, self.done, self.first = label, total, done, done
        self.start = self.last = time.monotonic()

    def __call__(self, count: int, text: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last < QUIET_SECONDS and self.done < self.total:
            return
        self.last = now
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        said = f", {text}" if text else ""
        say(f"{self.label}: {self.done}/{self.total}, {rate:.2f}/s, {_clock(left)} left{said}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else (
        f"{minutes}:{rest:02d}"
    )  # fmt: skip
