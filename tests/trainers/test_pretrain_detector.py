"""The job that makes the shapes world's detector: boxes, matching, loss, a few steps, resuming."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmalign.assets import assets_root
from mmalign.shapes import SHAPES, Placed, Scene, render, sample_scene, sample_spec
from mmalign.shapes.render import bounds
from mmalign.types import Media
from trainers.pretrain import data
from trainers.pretrain.detection import (
    Boxes,
    boxes_of,
    detection_accuracy,
    generalised_iou,
    grid_tokens,
)
from trainers.pretrain.detector import (
    GRID,
    DetectorConfig,
    build_detector,
    detector_loss,
    export,
    matched_tokens,
    train_detector,
)
from vision_rewards.geneval_models import Detector

TINY = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHARD_SIZE", 24)


def config(folder: Path, **changes) -> DetectorConfig:
    options = {"data": str(folder / "data"), "out": str(folder / "run"), "shards": 1, "unnamed": 4,
               "decoded_share": 0.0, "steps": 4, "batch_size": 4, "held_out": 0}  # fmt: skip
    return DetectorConfig(**{**options, **changes})


@pytest.mark.parametrize("shape", SHAPES)
def test_bounds_are_where_the_pixels_are(shape: str) -> None:
    placed = Placed(shape, "red", 0.45, 0.55, 0.25, 11.0, (255, 0, 0))
    picture = np.asarray(render(Scene((placed,), ((0, 0, 0), (0, 0, 0))), 256))[..., 0] > 127
    rows, columns = np.flatnonzero(picture.any(1)), np.flatnonzero(picture.any(0))
    seen = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    assert np.abs(np.asarray(seen) - 256 * np.asarray(bounds(placed))).max() < 1.6


def test_objects_of_a_scene_never_share_a_cell() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(sample_spec(rng, "train", "counting"), rng) for _ in range(200)]
    truth = boxes_of(scenes)
    for row, scene in zip(grid_tokens(truth, GRID).tolist(), scenes, strict=True):
        cells = row[: len(scene.objects)]
        assert len(set(cells)) == len(cells) and all(0 <= c < GRID**2 for c in cells)
        assert row[len(scene.objects) :] == [-1] * (4 - len(scene.objects))


def test_generalised_iou_by_hand() -> None:
    a = torch.tensor([0.5, 0.5, 0.4, 0.4])
    assert generalised_iou(a, a) == pytest.approx(1.0)
    # Side by side: no overlap, hull without a gap.
    assert generalised_iou(a, torch.tensor([0.9, 0.5, 0.4, 0.4])) == pytest.approx(0.0, abs=1e-6)
    # Half moved: IoU 1/3, hull = union.
    assert generalised_iou(a, torch.tensor([0.7, 0.5, 0.4, 0.4])) == pytest.approx(1 / 3)
    # Apart by their own width: hull 3, union 2.
    assert generalised_iou(a, torch.tensor([1.3, 0.5, 0.4, 0.4])) == pytest.approx(-1 / 3)


def _two_objects() -> Boxes:
    labels = torch.tensor([[1, 0, -1, -1]])
    boxes = torch.zeros(1, 4, 4)
    boxes[0, 0] = torch.tensor([0.2, 0.2, 0.2, 0.2])
    boxes[0, 1] = torch.tensor([0.8, 0.8, 0.2, 0.2])
    return Boxes(labels, boxes)


def test_matching_and_loss_by_hand() -> None:
    truth = _two_objects()
    logits = torch.zeros(1, 3, 6)
    boxes = torch.tensor([[[0.8, 0.8, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]]])
    tokens = matched_tokens(logits, boxes, truth)
    assert tokens.tolist() == [[2, 0, -1, -1]]
    # Sure of all classes: nothing is left but rounding.
    sure = torch.full((1, 3, 6), -30.0)
    for token, label in ((2, 1), (0, 0), (1, 5)):
        sure[0, token, label] = 30.0
    loss, parts = detector_loss(sure, boxes, truth, tokens, none_weight=0.3)
    assert loss.item() == pytest.approx(0.0, abs=1e-5) and parts["all_right"] == 1.0
    # One box 0.1 to the side: L1 0.1 / 2 objects; IoU 1/3 there.
    moved = boxes.clone()
    moved[0, 0, 0] -= 0.1
    loss, _ = detector_loss(sure, moved, truth, tokens, none_weight=0.3)
    assert loss.item() == pytest.approx(5 * 0.1 / 2 + 2 * (1 - 1 / 3) / 2, abs=1e-4)
    # Undecided between 6 classes: ln 6, however "none" weighs.
    loss, _ = detector_loss(logits, boxes, truth, tokens, none_weight=0.3)
    assert loss.item() == pytest.approx(float(np.log(6)), abs=1e-5)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, few: None) -> None:
    whole = train_detector(config(tmp_path, out=str(tmp_path / "a"), save_every=2), **TINY)
    train_detector(config(tmp_path, out=str(tmp_path / "b"), save_every=2, steps=4), **TINY)
    state = torch.load(tmp_path / "b" / "state.pt", weights_only=True)
    assert state["step"] == 4
    # The schedule depends on all steps, so that a stopped run is one with fewer steps done.
    (tmp_path / "c").mkdir()
    first = config(tmp_path, out=str(tmp_path / "c"), save_every=2)
    with pytest.raises(RuntimeError, match="stop"):
        _interrupted(first, after=3)
    resumed = train_detector(first, **TINY)
    one, two = (load_file(f / "model.safetensors") for f in (whole, resumed))
    assert all(one[k].equal(two[k]) for k in one)


def _interrupted(settings: DetectorConfig, after: int) -> None:
    """Train, and stop in the middle of a step as a kill would."""
    from trainers.pretrain import detector

    steps = detector.resumable_steps

    def stopping(*args, **options):
        for step in steps(*args, **options):
            if step == after:
                raise RuntimeError("stop")
            yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "resumable_steps", stopping)
        train_detector(settings, **TINY)


def test_export_is_a_stock_detector_of_the_shipped_size(tmp_path: Path) -> None:
    folder = export(build_detector(0), tmp_path / "detector")
    assert sum(f.stat().st_size for f in folder.iterdir()) < 3_000_000
    detector = Detector(folder, floor=0.0)
    assert detector.classes == tuple(sorted(SHAPES))
    found = detector(Media(torch.rand(2, 3, 64, 64)).data)
    boxes = [d.box for d in found[0].values() for d in d]
    assert len(found) == 2 and boxes and all(-64 <= v <= 128 for b in boxes for v in b)
    measured = detection_accuracy(folder, 4)
    assert set(measured) == {f"{n}@{t}" for n in ("recall", "precision", "exact")
                             for t in ("0.3", "0.9")}  # fmt: skip
    assert all(0.0 <= v <= 1.0 for v in measured.values())


@pytest.mark.skipif(
    not (assets_root() / "shapes-detector").is_dir(), reason="assets/shapes-detector is not there"
)
def test_the_shipped_detector_finds_objects() -> None:
    measured = detection_accuracy(assets_root() / "shapes-detector", 150)
    assert measured["recall@0.3"] > 0.98 and measured["precision@0.9"] > 0.98
    assert measured["exact@0.3"] > 0.93
