"""Running the studio until it is told to stop."""

from __future__ import annotations

from collections.abc import Callable

from mmalign.runtime.extras import optional
from mmalign.runtime.listening import listen, run_until_signal
from mmalign.studio.jobs import Studio

LOOPBACK = ("127.0.0.1", "localhost", "::1")
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
    listener = listen(host, port)
    if started is not None:
        shown = f"[{host}]" if ":" in host else host
        started(f"http://{shown}:{listener.getsockname()[1]}")
    run_until_signal(uvicorn.Server(config).run, listener)


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
