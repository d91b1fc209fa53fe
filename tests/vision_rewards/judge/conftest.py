"""A real chat server in a thread, and a real tiny vision-language model in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_server import ChatServer, serving
from tiny_vlm import write_vlm


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    """A running server; set ``chat.respond``."""
    with serving() as site:
        yield site


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llava model of random weights, its tokenizer and its processor."""
    return write_vlm(tmp_path_factory.mktemp("tiny-vlm"))
