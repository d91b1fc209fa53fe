"""Completes an evaluation: makes, judges and keeps what a folder lacks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from eval.assembly import assembly_line
from eval.clips import wanted_kind
from eval.judging import judge_batch, unscored
from eval.layouts import Cell
from eval.making import Existing, Made, Source
from eval.result import Row
from eval.store import Sample, Store
from mmalign.protocols import Benchmark, Request
from mmalign.runtime.progress import track


@dataclass(frozen=True)
class Run:
    """Makes, judges and keeps what a store lacks."""

    store: Store
    benchmark: Benchmark
    source: Source
    batch_size: int
    title: str | None

    def complete(
        self,
        requests: Sequence[Request],
        away: AbstractContextManager[None] | None = None,
    ) -> list[Sample]:
        """The samples of all ``requests``, in their order.

        Args:
            away: entered between making everything and judging everything; ``None`` does both at
                the same time.
        """
        done = self.store.finished(requests)
        todo = self.store.workers.share([r for r in requests if r.key not in done])
        fresh: list[Sample] = []
        if away is not None:
            made = self.store.unjudged(todo)
            fresh += self._line([r for r in todo if r.key not in made], self.source, judging=False)
        made = self.store.unjudged(todo)
        settled = {s.row.key for s in fresh}
        waiting = [r for r in todo if r.key in made]
        lacking = [r for r in todo if r.key not in made and r.key not in settled]
        with away or nullcontext():
            files = {k: self._cell(s.row) for k, s in made.items()}
            fresh += self._line(waiting, Existing(files, wanted_kind(self.benchmark)))
            fresh += self._line(lacking, self.source)
        every = done | {s.row.key: s for s in self.store.join(fresh)}
        return [every[r.key] for r in requests]

    def _line(
        self, requests: Sequence[Request], source: Source, judging: bool = True
    ) -> list[Sample]:
        """Every request made, judged (or not yet) and kept; the samples that need no judging."""
        size = self.batch_size
        batches = [requests[a : a + size] for a in range(0, len(requests), size)]
        title = f"{self.title}" if judging else f"{self.title}, pictures"
        judge, keep = (self._judge, self._keep) if judging else (_later, self._keep_unjudged)
        samples: list[Sample] = []
        with track(title, len(requests), enabled=self.title is not None) as advance:
            for batch, kept in zip(
                batches, assembly_line(batches, source, judge, keep), strict=True
            ):
                samples += [s for s in kept if s.judged]
                advance(len(batch))
        return samples

    def _judge(
        self, batch: Sequence[Request], made: tuple[list[Made], float]
    ) -> tuple[list[Row], list[Made], float]:
        pictures, nfe = made
        rows = judge_batch(self.benchmark, batch, pictures, self.store.image_name)
        return rows, pictures, nfe

    def _keep(
        self,
        batch: Sequence[Request],
        judged: tuple[list[Row], list[Made], float],
        seconds: float,
    ) -> list[Sample]:
        rows, pictures, nfe = judged
        # A picture that comes out of the store's own file is there already.
        images = [None if m.file is not None else m.image for m in pictures]
        return self.store.add(rows, images, seconds, nfe)

    def _keep_unjudged(
        self, batch: Sequence[Request], made: tuple[list[Made], float], seconds: float
    ) -> list[Sample]:
        pictures, nfe = made
        kept = []
        for request, one in zip(batch, pictures, strict=True):
            # What cannot be judged is finished: its file would not show why.
            row = unscored(request, one.reason or "not judged yet", self.store.image_name)
            share = seconds / len(batch), nfe / len(batch)
            kept += self.store.add([row], [one.image], *share, judged=bool(one.reason))
        return kept

    def _cell(self, row: Row) -> Cell:
        assert self.store.folder is not None and row.image is not None
        return Cell(self.store.folder / row.image)


def _later(batch: Sequence[Request], made: Any) -> Any:
    return made
