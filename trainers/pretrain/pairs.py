"""Batches for contrastive training in which the wrong captions are nearly right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmalign.shapes import ObjectSpec, PromptSpec, Scene
from trainers.pretrain.captions import CaptionTable, true_specs
from trainers.pretrain.scenes import Pool


@dataclass(frozen=True)
class Batch:
    """One step's pictures and captions.

    Attributes:
        pixels: ``(B, 3, H, W)`` in [0, 1].
        layouts: ``(B, 8, 8, 13)`` coverage in [0, 1].
        numbers: ``(U,)`` which captions the columns are.
        own: ``(B,)`` column of each picture's caption, -1 where no caption is true.
        true, unsure: ``(B, U)`` what can, or neither can nor cannot, be said of a picture.
        wrong: ``(B, K)`` columns of each picture's near misses.
    """

    pixels: Tensor
    layouts: Tensor
    numbers: Tensor
    own: Tensor
    true: Tensor
    unsure: Tensor
    wrong: Tensor


class PairSampler:
    """Draws batches: a third of the pictures are partners whose caption nearly fits another.

    Args:
        pool: pictures with their scenes.
        table: all captions; only those of the training split are drawn.
        batch_size: pictures a step.
        negatives: near misses for each picture.
        unnamed: pictures a step of which no caption is true (fewer where the pool has none).
    """

    def __init__(
        self, pool: Pool, table: CaptionTable, batch_size: int, negatives: int, unnamed: int
    ) -> None:
        self.pool, self.table, self.negatives = pool, table, negatives
        numbered = [-1 if s is None else table.number(s) for s in pool.specs]
        self.numbers = np.asarray(numbered)
        self.named = np.flatnonzero(self.numbers >= 0)
        self.others = np.flatnonzero(self.numbers < 0)
        self.unnamed = min(unnamed, batch_size // 4) if len(self.others) else 0
        self.anchors = (batch_size - self.unnamed) // 2
        self.partners = batch_size - self.unnamed - self.anchors
        self.rows_of: dict[int, np.ndarray] = {}
        order = self.named[np.argsort(self.numbers[self.named], kind="stable")]
        found, starts = np.unique(self.numbers[order], return_index=True)
        for number, rows in zip(found, np.split(order, starts[1:]), strict=True):
            self.rows_of[int(number)] = rows
        self._facts: dict[int, tuple[list[int], list[int]]] = {}

    def batch(self, rng: np.random.Generator) -> Batch:
        """Draw a batch."""
        rows = self._rows(rng)
        wrong = np.asarray([self._wrong(int(r), rng) for r in rows])
        own = self.numbers[rows]
        numbers = np.unique(np.concatenate([own[own >= 0], wrong.ravel()]))
        place = np.full(len(self.table), -1)
        place[numbers] = np.arange(len(numbers))
        true = np.zeros((len(rows), len(numbers)), bool)
        unsure = np.zeros_like(true)
        for i, row in enumerate(rows):
            for mask, facts in zip((true, unsure), self.facts(int(row)), strict=True):
                columns = place[facts]
                mask[i, columns[columns >= 0]] = True
        layouts = torch.from_numpy(self.pool.layouts[rows]).float() / 255
        return Batch(
            self.pool.pixels(rows),
            layouts,
            torch.from_numpy(numbers),
            torch.from_numpy(np.where(own >= 0, place[own], -1)),
            torch.from_numpy(true),
            torch.from_numpy(unsure),
            torch.from_numpy(place[wrong]),
        )

    def facts(self, row: int) -> tuple[list[int], list[int]]:
        """Numbers of the captions that are true of a picture, and of those too close to call."""
        if row not in self._facts:
            specs = true_specs(self.pool.scenes[row])
            true, unsure = ([self.table.number(s) for s in part] for part in specs)
            self._facts[row] = true, unsure
        return self._facts[row]

    def _rows(self, rng: np.random.Generator) -> np.ndarray:
        anchors = rng.choice(self.named, self.anchors)
        partners = [self._partner(int(a), rng) for a in anchors[: self.partners]]
        while len(partners) < self.partners:
            partners.append(int(rng.choice(self.named)))
        others = rng.choice(self.others, self.unnamed) if self.unnamed else np.zeros(0, int)
        return np.concatenate([anchors, np.asarray(partners, int), others])

    def _partner(self, row: int, rng: np.random.Generator) -> int:
        """A picture whose caption is a near miss of this one's: a hard negative picture."""
        groups = self.table.negatives(int(self.numbers[row]))
        shown = [m for group in groups.values() for m in group if m in self.rows_of]
        if not shown:
            return int(rng.choice(self.named))
        return int(rng.choice(self.rows_of[int(rng.choice(shown))]))

    def _wrong(self, row: int, rng: np.random.Generator) -> list[int]:
        """Near misses of a picture's caption, kinds in turn, all of them false."""
        said = {n for part in self.facts(row) for n in part}
        number = int(self.numbers[row])
        if number >= 0:
            groups = list(self.table.negatives(number).values())
        else:
            groups = [self._claims(self.pool.scenes[row])]
        groups = [kept for g in groups if (kept := [m for m in g if m not in said])]
        order = rng.permutation(len(groups))
        picks = [groups[order[k % len(groups)]] for k in range(self.negatives)]
        return [int(group[rng.integers(len(group))]) for group in picks]

    def _claims(self, scene: Scene) -> list[int]:
        """What a careless reader would say of a picture that no caption describes."""
        specs: list[PromptSpec] = []
        odd, first = scene.objects[-1], scene.objects[0]
        for colored in (True, False):
            a, b = (ObjectSpec(o.shape, o.color if colored else None) for o in (first, odd))
            specs += [PromptSpec((a, b)), PromptSpec((b, a)), PromptSpec((a,)), PromptSpec((b,))]
        for count in (len(scene.objects) - 1, len(scene.objects)):
            specs.append(PromptSpec((ObjectSpec(first.shape, None, count),)))
        numbers = [self.table.number(s) for s in specs]
        return [n for n in numbers if self.table.in_training[n]]


def contrastive_targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which pairs a softmax must leave out: the other captions that are true, or may be.

    Returns:
        ``(R, U)`` for captions of the ``R`` named pictures and ``(R, B)`` for pictures of their
        captions.
    """
    named = batch.own >= 0
    own = batch.own[named]
    hidden = batch.true | batch.unsure
    captions = hidden[named].clone()
    captions[torch.arange(len(own)), own] = False
    pictures = hidden[:, own].T.clone()
    pictures[torch.arange(len(own)), named.nonzero()[:, 0]] = False
    return captions, pictures
