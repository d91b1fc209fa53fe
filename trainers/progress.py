"""Progress of a training run: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from mmalign.runtime.log import say

LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Context manager around a run; silent on processes other than the main one."""

    def __init__(self, total: int, done: int, enabled: bool = True) -> None:
        self.total, self.first = total, done
        self.enabled = enabled
        self.start = self.last_line = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn())
            tail = (TimeRemainingColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, *tail, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.first)
        return self

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show step and the few numbers one watches."""
        text = " ".join(
            f"{name} {metrics[key]:.4g}"
            for name, key in (
                ("reward", "reward/mean"),
                ("std", "reward/std"),
                ("kl", "kl"),
                ("clip", "clip_fraction"),
                ("grad", "grad_norm"),
            )
            if key in metrics
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
            return
        now = time.monotonic()
        if self.enabled and (now - self.last_line >= LINE_EVERY or step == self.total):
            self.last_line = now
            left = (now - self.start) / max(step - self.first, 1) * (self.total - step)
            say(f"train {step}/{self.total} {text} ({left:.0f} s left)")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
