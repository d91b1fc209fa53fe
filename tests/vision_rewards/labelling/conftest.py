"""Rendered pictures, tasks on them, and servers to label them on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from label_server import TOKEN, running

from mmalign.shapes import caption, render, sample_scene, sample_spec
from vision_rewards.labelling.server import Access
from vision_rewards.labelling.tasks import Pair


def draw(folder: Path, count: int) -> list[dict[str, str]]:
    """``count`` pairs of pictures in ``folder`` and their tasks."""
    rng = random.Random(5)
    rows = []
    for number in range(count):
        spec = sample_spec(rng, "train")
        for side in "ab":
            render(sample_scene(spec, rng), 32).save(folder / f"{number}{side}.png")
        names = {f"image_{side}": f"{number}{side}.png" for side in "ab"}
        rows.append({"prompt": f"{caption(spec)}, number {number}", **names})
    return rows


@pytest.fixture
def tasks(tmp_path: Path) -> Callable[..., Path]:
    """``tasks(count)``: a file of tasks with its pictures."""

    def made(count: int = 6) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir()
        rows = draw(folder, count)
        path = folder / "tasks.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return made


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[[int], list[Pair]]:
    """``pairs(count)``: pairs whose pictures lie beside the labels."""

    def made(count: int) -> list[Pair]:
        rows = draw(tmp_path, count)
        return [Pair(row["prompt"], row["image_a"], row["image_b"]) for row in rows]

    return made


@pytest.fixture
def serve(tmp_path: Path, pairs: Callable[[int], list[Pair]]) -> Iterator[Callable[..., Any]]:
    """``serve(count, **order)``: a server that lives as long as the test."""
    with ExitStack() as stack:

        def started(count: int = 6, access: Access | None = None, **order: Any) -> Any:
            access = access or Access(token=TOKEN)
            order = {"repeat": 0.0, **order}
            made = running(pairs(count), tmp_path / "labels.jsonl", access, **order)
            return stack.enter_context(made)

        yield started
