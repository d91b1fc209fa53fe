"""A data set as tensors: which cells (picture, prompt) a sample compares, and what was said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vision_rewards.training.records import Dataset

Cell = tuple[Path, str]


@dataclass(frozen=True)
class Batch:
    """Some samples: ``cells (B, K)`` rows of the cell list (0 where ``present`` is false),
    ``target (B, T)``, ``weight (B,)``, ``margin (B,)``, ``user (B,)`` (-1: nobody known)."""

    cells: Tensor
    present: Tensor
    target: Tensor
    weight: Tensor
    margin: Tensor
    user: Tensor

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, rows: Tensor) -> Batch:
        return Batch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class CellIndex:
    """The distinct (picture, prompt) cells of several data sets, numbered."""

    def __init__(self, *datasets: Dataset) -> None:
        self.number: dict[Cell, int] = {}
        for dataset in datasets:
            for sample in dataset.samples:
                for image in sample.images:
                    self.number.setdefault((image, sample.prompt), len(self.number))

    @property
    def cells(self) -> list[Cell]:
        """All cells in the order of their numbers."""
        return list(self.number)


def tabulate(dataset: Dataset, index: CellIndex, users: Sequence[str]) -> Batch:
    """All samples of ``dataset`` as one :class:`Batch`; targets of rankings are padded with NaN."""
    samples = dataset.samples
    width = max((len(s.images) for s in samples), default=1)
    outcomes = max((len(s.target) for s in samples), default=1)
    cells = torch.zeros(len(samples), width, dtype=torch.int64)
    present = torch.zeros(len(samples), width, dtype=torch.bool)
    target = torch.full((len(samples), outcomes), torch.nan)
    known = {name: k for k, name in enumerate(users)}
    for row, s in enumerate(samples):
        numbers = [index.number[image, s.prompt] for image in s.images]
        cells[row, : len(numbers)] = torch.tensor(numbers)
        present[row, : len(numbers)] = True
        target[row, : len(s.target)] = torch.tensor(s.target)
    return Batch(
        cells,
        present,
        target,
        torch.tensor([s.weight for s in samples]),
        torch.tensor([s.margin for s in samples]),
        torch.tensor([known.get(s.user, -1) for s in samples], dtype=torch.int64),
    )


def users_of(dataset: Dataset) -> tuple[str, ...]:
    """Names of the annotators, sorted; samples without one do not count."""
    return tuple(sorted({s.user for s in dataset.samples if s.user}))


def chunks(batch: Batch, size: int) -> Iterator[Batch]:
    """The samples in order, at most ``size`` at a time."""
    for at in range(0, len(batch), size):
        yield batch[torch.arange(at, min(at + size, len(batch)))]
