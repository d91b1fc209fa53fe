"""Small official-format files, and rows with values written by hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from chat_server import ChatServer, serving

from eval.benchmarks.base import PromptBenchmark
from eval.result import Row


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    """A judge's server; set ``chat.respond``."""
    with serving() as site:
        yield site


@pytest.fixture
def official() -> Callable[[str], Path]:
    """A folder of official files, where ``MMALIGN_OFFICIAL_DATA`` says they are."""

    def folder(name: str) -> Path:
        root = os.environ.get("MMALIGN_OFFICIAL_DATA")
        if not root or not (Path(root) / name).is_dir():
            pytest.skip(f"MMALIGN_OFFICIAL_DATA has no folder {name}")
        return Path(root) / name

    return folder


Rows = Callable[..., list[Row]]


@pytest.fixture
def rows() -> Rows:
    """``rows(benchmark, values, parts)``: a row for each request, ``None`` for unscored."""

    def make(
        benchmark: PromptBenchmark,
        values: Sequence[float | None],
        parts: Sequence[Mapping[str, float | None]] | None = None,
    ) -> list[Row]:
        requests = benchmark.requests()
        assert len(requests) == len(values)
        told = parts or [{}] * len(values)
        return [
            Row(key=r.key, prompt=r.prompt, task=r.task, sample=r.sample, seed=r.seed, value=value,
                valid=value is not None, parts=part)
            for r, value, part in zip(requests, values, told, strict=True)
        ]  # fmt: skip

    return make
