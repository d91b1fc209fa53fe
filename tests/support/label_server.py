"""A labelling server on a thread, for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmalign.runtime.listening import listen
from vision_rewards.labelling.decisions import LabelFile
from vision_rewards.labelling.gallery import Gallery
from vision_rewards.labelling.server import Access
from vision_rewards.labelling.session import Session
from vision_rewards.labelling.tasks import Pair

TOKEN = "a-token-of-the-tests"


@contextmanager
def running(pairs: list[Pair], path: Path, access: Access, **order: Any) -> Iterator[Any]:
    """A server on a thread: ``url``, ``link(name)``."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    from vision_rewards.labelling.app import create_app

    file = LabelFile(path)
    gallery = Gallery(f for p in pairs for f in p.files(path.parent.resolve()))
    app = create_app(Session(pairs, file, **order), gallery, access)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    try:
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{port}", link=lambda name="": access.link(port, name), path=path
        )
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        file.close()
        assert not thread.is_alive()
