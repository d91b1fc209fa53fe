"""What every test shares: no network, no hub, a way to run the command line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.register_assert_rewrite("reward_builds")  # of tests/support
LOOPBACK = ("localhost", "127.0.0.1", "::1", "")

# Read when the libraries are imported, so they are set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class NetworkBlockedError(AssertionError):
    """A test reached for the network."""


def _local(address: Any) -> bool:
    if not isinstance(address, tuple):  # AF_UNIX paths
        return True
    return str(address[0]) in LOOPBACK or str(address[0]).startswith("127.")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connections beyond this machine fail loudly, in every test."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex
    getaddrinfo = socket.getaddrinfo

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(self: socket.socket, address: Any) -> Any:
            if not _local(address):
                raise NetworkBlockedError(f"a test tried to connect to {address}")
            return function(self, address)

        return guarded

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and not _local((name,)) and name != socket.gethostname():
            raise NetworkBlockedError(f"a test tried to resolve {host}")
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guard(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guard(connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on many threads, and sums depend on their number."""
    torch = sys.modules.get("torch")  # a test of light imports must not load it here
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_python(
    *args: str, cwd: Path | None = None, path: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """``python *args`` with the suite importable from ``path``."""
    env = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=cwd or ROOT, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """:func:`run_python`."""
    return run_python


@pytest.fixture
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``mmalign *args`` in a process of its own."""

    def run(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "mmalign", *args, **options)

    return run
