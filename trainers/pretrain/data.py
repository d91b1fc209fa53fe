"""Rendered training sets of the shapes world, written in resumable shards."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from mmalign.shapes import (
    PromptSpec,
    Scene,
    caption,
    render,
    render_layout,
    sample_scene,
    sample_spec,
)
from mmalign.shapes.splits import trainable_pair

SHARD_SIZE = 10_000
# More weight on the families a small model finds hard; a share of the data, in TASKS' names.
TASK_WEIGHTS = {
    "single_object": 0.06,
    "two_object": 0.14,
    "counting": 0.24,
    "colors": 0.12,
    "position": 0.24,
    "color_attr": 0.20,
}


def shard_scenes(index: int, seed: int = 0) -> Iterator[tuple[PromptSpec, Scene]]:
    """What each picture of a shard shows and was drawn for, in the order of the shard."""
    rng = random.Random(f"shapes shard {seed} {index}")
    for _ in range(SHARD_SIZE):
        task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
        spec = sample_spec(rng, "train", task)
        yield spec, sample_scene(spec, rng, trainable_pair)


def render_shard(path: Path, index: int, size: int = 64, seed: int = 0) -> None:
    """Render one shard: ``SHARD_SIZE`` pictures, their captions and layout maps, all from train."""
    images = np.empty((SHARD_SIZE, size, size, 3), np.uint8)
    layouts = []
    captions = []
    for i, (spec, scene) in enumerate(shard_scenes(index, seed)):
        images[i] = np.asarray(render(scene, size))
        layouts.append(render_layout(scene))
        captions.append(caption(spec))
    partial = path.with_suffix(".tmp.npz")
    np.savez(partial, images=images, layouts=np.stack(layouts), captions=json.dumps(captions))
    os.replace(partial, path)


def ensure_shards(folder: Path, count: int, workers: int = 1, seed: int = 0) -> list[Path]:
    """Render the shards ``0 .. count - 1`` that ``folder`` lacks; returns all their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"shard_{i:04d}.npz" for i in range(count)]
    todo = [(i, p) for i, p in enumerate(paths) if not p.exists()]
    if len(todo) <= 1 or workers <= 1:
        for i, p in todo:
            render_shard(p, i, seed=seed)
        return paths
    with ProcessPoolExecutor(workers) as pool:
        for future in [pool.submit(render_shard, p, i, 64, seed) for i, p in todo]:
            future.result()
    return paths


def load_images(paths: Iterable[Path]) -> np.ndarray:
    """Pictures of several shards, ``(N, size, size, 3)`` uint8."""
    return np.concatenate([np.load(p)["images"] for p in paths])


def load_captions(path: Path) -> list[str]:
    """Captions of one shard."""
    return list(json.loads(str(np.load(path)["captions"])))
