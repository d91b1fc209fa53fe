"""What the optimisers of noise share: where each prompt began, the best it reached, the record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.protocols import Steered
from mmalign.steering.common import values_of
from mmalign.steering.engine import Engine, scored
from mmalign.steering.gradient import Ascent, norms
from mmalign.types import Media, Score


class Climb:
    """One sample a prompt, looked at once an iteration.

    The result has two candidates for each prompt, the start and the best one, so that what
    steering did can be seen; one where nothing better was found.

    Attributes:
        best: ``(P,)`` best scores so far, ``-inf`` before the first.
        since: ``(P,)`` iterations since the best one improved.
    """

    def __init__(self, engine: Engine, seeds: Sequence[int], iterations: int) -> None:
        self.engine, self.seeds, self.iterations = engine, list(seeds), iterations
        prompts = len(engine.prompts)
        self.best = torch.full((prompts,), -torch.inf)
        self.since = torch.zeros(prompts, dtype=torch.int64)
        self.trace: list[dict[str, Any]] = []
        self._start: dict[int, tuple[Media, Score]] = {}
        self._top: dict[int, tuple[int, Media, Score]] = {}

    def see(self, iteration: int, found: Ascent, owners: Tensor, **columns: Tensor) -> None:
        """Take in an iteration of the prompts ``owners``.

        Args:
            columns: numbers ``(B,)`` for the record.

        Raises:
            ValueError: a prompt's first sample could not be scored; quotes the reason.
        """
        scores = found.scores
        if iteration == 0:
            self.engine.check_scored(scores, owners)
        good = scored(scores)
        values = values_of(scores)
        lengths = norms(found.gradient).tolist()
        plain = {name: column.tolist() for name, column in columns.items()}
        for row, prompt in enumerate(owners.tolist()):
            if iteration == 0:
                self._start[prompt] = (self._kept(found.media, row), scores[[row]])
            self.since[prompt] += 1
            if good[row] and scores.value[row] > self.best[prompt]:
                self.best[prompt], self.since[prompt] = scores.value[row], 0
                self._top[prompt] = (iteration, self._kept(found.media, row), scores[[row]])
            line: dict[str, Any] = {
                "prompt": prompt, "iteration": iteration, "value": values[row],
                "best": float(self.best[prompt]), "gradient": lengths[row],
                **{name: column[row] for name, column in plain.items()},
            }  # fmt: skip
            if not good[row]:
                line["note"] = (scores.notes[row] if scores.notes else "") or "unscored"
            self.trace.append({k: v if _writable(v) else None for k, v in line.items()})
        self.engine.show(iteration + 1, self.iterations, self.best)

    def live(self, patience: int | None, target: float | None) -> Tensor:
        """Prompts that have neither reached ``target`` nor stood still for ``patience``."""
        going = torch.ones(len(self.best), dtype=torch.bool)
        if patience is not None:
            going &= self.since < patience
        if target is not None:
            going &= self.best < target
        return torch.nonzero(going).flatten()

    def finish(self) -> Steered:
        """Start and best of each prompt, ranked by score."""
        media, scores, owners, lineage = [], [], [], []
        for prompt in range(len(self.engine.prompts)):
            start, top = (0, *self._start[prompt]), self._top[prompt]
            for iteration, picture, score in [start] if top[0] == 0 else [start, top]:
                media.append(picture)
                scores.append(score)
                owners.append(prompt)
                lineage.append({"seed": self.seeds[prompt], "iteration": iteration})
        return self.engine.finish(
            Media.cat(media), Score.cat(scores), torch.tensor(owners), lineage, self.trace
        )

    @staticmethod
    def _kept(media: Media, row: int) -> Media:
        return Media(media.data[row : row + 1].float().cpu())


def _writable(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
