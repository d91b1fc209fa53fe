"""What the local servers share: a socket that listens at once, and running until a signal."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable


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
