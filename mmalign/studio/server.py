"""Running the studio until it is told to stop."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from mmalign.runtime.extras import optional
from mmalign.studio.jobs import Studio

LOOPBACK = {"127.0.0.1": socket.AF_INET, "localhost": socket.AF_INET, "::1": socket.AF_INET6}
PORT = 8124


class StudioError(ValueError):
    """A studio that must not be started like this."""


def serve(
    studio: Studio,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Args:
        port: 0 takes a free one.
        started: told the address once connections are accepted.

    Raises:
        StudioError: an address that others can reach.
        MissingExtraError: FastAPI or uvicorn is not installed.
        OSError: the port is taken.
    """
    check_host(host, port)
    uvicorn = optional("uvicorn", "studio", "The studio")
    optional("fastapi", "studio", "The studio")
    from mmalign.studio.app import create_app

    config = uvicorn.Config(
        create_app(studio), log_level="warning", access_log=False, timeout_graceful_shutdown=2
    )
    with _listening(host, port) as listener:
        if started is not None:
            shown = f"[{host}]" if ":" in host else host
            started(f"http://{shown}:{listener.getsockname()[1]}")
        _run(uvicorn.Server(config).run, listener)


def _run(run: Callable[..., None], listener: socket.socket) -> None:
    """Run to the end; the signal that ended it was obeyed, so it does not end the process too."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: None) if main else None
    try:
        with suppress(KeyboardInterrupt):  # raised again by uvicorn after its orderly end
            run(sockets=[listener])
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def check_host(host: str, port: int = PORT) -> None:
    """Refuse to listen where others can connect: a reward may be a Python file.

    Raises:
        StudioError: not an address of this machine alone; says how to reach it from elsewhere.
    """
    if host not in LOOPBACK:
        raise StudioError(
            f"the studio runs code that is named on its page, so it listens on this machine only "
            f"({', '.join(LOOPBACK)}), not on {host!r}. From another machine: "
            f"ssh -L {port}:127.0.0.1:{port} THIS_MACHINE, then open http://127.0.0.1:{port} there"
        )


def _listening(host: str, port: int) -> socket.socket:
    listener = socket.socket(LOOPBACK[host], socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(32)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener
