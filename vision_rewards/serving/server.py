"""Running a reward server until it is told to stop."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable

from mmalign.protocols import RewardModel
from vision_rewards.serving.safety import ServerSettings, ServerSettingsError, check_exposure

GRACE = 30  # seconds that requests under way get to finish in


def serve(
    reward: RewardModel,
    settings: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8123,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve ``reward`` until SIGINT or SIGTERM; requests under way are finished first.

    Args:
        port: 0 takes a free one.
        started: told the address once connections are accepted.

    Raises:
        ServerSettingsError: reachable by others without a token, or no server packages here.
        OSError: the address is taken or not this machine's.
    """
    check_exposure(host, settings.token)
    try:
        import uvicorn

        from vision_rewards.serving.app import create_app
    except ImportError as error:
        raise ServerSettingsError(
            f"serving needs FastAPI and uvicorn ({error}): pip install 'mmalign[server]'"
        ) from error
    config = uvicorn.Config(
        create_app(reward, settings),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
    )
    listener = listen(host, port)
    if started is not None:
        shown = f"[{host}]" if ":" in host else host
        started(f"http://{shown}:{listener.getsockname()[1]}")
    run_until_signal(uvicorn.Server(config).run, listener)


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections already; port 0 takes a free one.

    Raises:
        OSError: the address is taken or not this machine's; the message names it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol must be named: asyncio turns off Nagle's delays only where it is.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # Listening before the address is announced: a caller that is told it can connect at once.
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def run_until_signal(run: Callable[..., None], listener: socket.socket) -> None:
    """Run to the end; the signal that ended it was obeyed, so it does not end the process too."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: None) if main else None
    try:
        run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises the signal again after its orderly end
        pass
    finally:
        listener.close()
        if main:
            signal.signal(signal.SIGTERM, before)
