"""Real servers on free ports of this machine, and pictures to send to them."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch

from mmalign.shapes import caption, render, sample_scene, sample_spec
from mmalign.types import Media
from vision_rewards.function import FunctionReward

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")


@contextmanager
def running(reward, **settings) -> Iterator[SimpleNamespace]:
    """A server on a thread: ``url``, ``service``."""
    from mmalign.runtime.listening import listen
    from vision_rewards.serving.app import create_app
    from vision_rewards.serving.safety import ServerSettings

    app = create_app(reward, ServerSettings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", service=app.state.service, port=port)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture
def serve():
    """``serve(reward, **settings)``: a server that lives as long as the test."""
    with ExitStack() as stack:
        yield lambda reward, **settings: stack.enter_context(running(reward, **settings))


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """Rewards and pictures for all tests here."""

    def contrast(media: torch.Tensor, prompts) -> torch.Tensor:
        """A reward of floats, whose last bits change with every bit of the picture."""
        return media.flatten(1).std(1) * 3.7 + media.flatten(1).sum(1) / 7

    rng = random.Random(3)
    specs = [sample_spec(rng, "train") for _ in range(5)]
    scenes = Media.from_pil([render(sample_scene(s, rng)) for s in specs])
    noise = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(
        running=running,
        scenes=scenes,
        captions=[caption(s) for s in specs],
        noise=Media(noise),
        contrast=FunctionReward(contrast, takes="tensor", media=("image", "video")),
    )
