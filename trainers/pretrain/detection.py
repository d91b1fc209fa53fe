"""Boxes of scenes: targets of the detector, overlaps, and how well a detector finds objects."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmalign.shapes import SHAPES, Scene, render, sample_scene, sample_spec
from mmalign.shapes.grammar import MAX_OBJECTS
from mmalign.shapes.render import bounds
from mmalign.types import Media


@dataclass(frozen=True)
class Boxes:
    """Objects of ``B`` scenes: classes ``(B, 4)``, -1 for none, boxes ``(B, 4, 4)``.

    Boxes are centre, width and height as shares of the side; empty places come last.
    """

    labels: Tensor
    boxes: Tensor

    def __getitem__(self, rows: Tensor) -> Boxes:
        return Boxes(self.labels[rows], self.boxes[rows])


def boxes_of(scenes: Sequence[Scene]) -> Boxes:
    """Classes and boxes of the objects of scenes."""
    labels = torch.full((len(scenes), MAX_OBJECTS), -1)
    boxes = torch.zeros(len(scenes), MAX_OBJECTS, 4)
    for row, scene in enumerate(scenes):
        for place, placed in enumerate(scene.objects):
            x0, y0, x1, y1 = bounds(placed)
            labels[row, place] = SHAPES.index(placed.shape)
            boxes[row, place] = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
    return Boxes(labels, boxes)


def grid_tokens(truth: Boxes, grid: int) -> Tensor:
    """The cell of a ``grid x grid`` raster that holds the centre of each object, -1 for none."""
    cells = (truth.boxes[..., :2] * grid).long().clamp(0, grid - 1)
    return torch.where(truth.labels >= 0, cells[..., 1] * grid + cells[..., 0], -1)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes (centre and size) that broadcast, in [-1, 1] (1902.09630, algorithm 1)."""
    low_a, high_a = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
    low_b, high_b = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
    common = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - common
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1)
    hull = hull.clamp(min=1e-6)
    return common / union.clamp(min=1e-6) - (hull - union) / hull


def detection_accuracy(
    folder: Path, count: int, thresholds: Sequence[float] = (0.3, 0.9), seed: int = 0
) -> dict[str, float]:
    """How well the detector in ``folder`` finds the objects of ``count`` test scenes.

    For each confidence: ``recall``, the share of objects found (right class, overlap of at least
    one half), ``precision``, the share of detections that are one, and ``exact``, the share of
    pictures with every object found once and nothing else.
    """
    from vision_rewards.geneval_models import Detector

    rng = random.Random(f"detector test {seed}")
    scenes = [sample_scene(sample_spec(rng, "test"), rng) for _ in range(count)]
    detector = Detector(folder, floor=min(thresholds), batch_size=64)
    found = detector(Media.from_pil([render(scene) for scene in scenes]).data)
    measured: dict[str, float] = {}
    for threshold in thresholds:
        sums = [0, 0, 0, 0]
        for scene, objects in zip(scenes, found, strict=True):
            kept = {n: [o.box for o in some if o.score > threshold] for n, some in objects.items()}
            hits, total = _hits(scene, kept), sum(map(len, kept.values()))
            exact = hits == total == len(scene.objects)
            sums = [
                s + v for s, v in zip(sums, (hits, len(scene.objects), total, exact), strict=True)
            ]
        hits, objects_there, total, exact_ones = sums
        measured[f"recall@{threshold:g}"] = hits / objects_there
        measured[f"precision@{threshold:g}"] = hits / max(total, 1)
        measured[f"exact@{threshold:g}"] = exact_ones / count
    return measured


def _hits(scene: Scene, found: dict[str, list[tuple[float, float, float, float]]]) -> int:
    """Objects that a detection of their class overlaps by at least one half, each taken once."""
    hits = 0
    left = {name: list(boxes) for name, boxes in found.items()}
    for placed in scene.objects:
        wanted = tuple(64 * v for v in bounds(placed))
        some = left.get(placed.shape, [])
        best = max(some, key=lambda box: _overlap(box, wanted), default=None)
        if best is not None and _overlap(best, wanted) >= 0.5:
            some.remove(best)
            hits += 1
    return hits


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0
