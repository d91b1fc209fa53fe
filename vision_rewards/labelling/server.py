"""Starting the labelling server: who may reach it, under which link, until it is told to stop."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from mmalign.runtime.listening import listen, run_until_signal
from vision_rewards.labelling.gallery import Gallery
from vision_rewards.labelling.session import Session
from vision_rewards.serving.safety import ServerSettingsError, is_loopback

SHORTEST_TOKEN = 8
_ANY = ("0.0.0.0", "::")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may reach the server.

    Attributes:
        host: address to listen on.
        token: what the link carries; ``None`` asks for none, on loopback only.
        names: host names under which the server may be asked, beside its own.

    Raises:
        ServerSettingsError: others could reach it without a token, or a token that is short or
            does not fit into a header.
    """

    host: str = "127.0.0.1"
    token: str | None = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.token is None:
            if not is_loopback(self.host):
                raise ServerSettingsError(
                    f"host {self.host!r} is reachable from other machines and there is no token: "
                    "leave out --no-token, or bind 127.0.0.1"
                )
        elif len(self.token) < SHORTEST_TOKEN or not self.token.isascii() or " " in self.token:
            raise ServerSettingsError(
                f"the token must be at least {SHORTEST_TOKEN} ASCII characters without spaces"
            )
        elif not self.token.isprintable():
            raise ServerSettingsError("the token must be printable ASCII, to fit into a header")

    def admits(self, header: str | None) -> bool:
        """Whether a ``Host`` header names this server. A page of another site that points its own
        name at this machine (DNS rebinding) sends that name, and is refused."""
        name = host_name(header or "")
        if is_loopback(name) or name in (self.host.strip("[]").lower(), *self._own_names()):
            return True
        # An address cannot be rebound; which one callers use is the network's affair.
        return not is_loopback(self.host) and _is_address(name)

    def _own_names(self) -> tuple[str, ...]:
        own = () if is_loopback(self.host) else (socket.gethostname(),)
        return tuple(n.lower() for n in (*self.names, *own))

    def link(self, port: int, annotator: str = "") -> str:
        """The address to open. Token and name stand behind ``#``: browsers keep that part to
        themselves, so neither ends up in a log or a ``Referer``."""
        host = socket.gethostname() if self.host in _ANY else self.host
        shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
        parts = {"token": self.token or "", "annotator": annotator}
        fragment = "&".join(f"{k}={quote(v, safe='')}" for k, v in parts.items() if v)
        return f"http://{shown}:{port}/" + (f"#{fragment}" if fragment else "")


def host_name(header: str) -> str:
    """The name in a ``Host`` header, without the port."""
    text = header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _is_address(name: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def serve(
    session: Session,
    gallery: Gallery,
    access: Access,
    *,
    port: int = 8124,
    annotators: Sequence[str] = (),
    started: Callable[[list[str]], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        port: 0 takes a free one.
        annotators: names that get a link of their own; without any, the page asks.
        started: told the links once connections are accepted.

    Raises:
        ServerSettingsError: no server packages here.
        OSError: the address is taken or not this machine's.
    """
    try:
        import uvicorn

        from vision_rewards.labelling.app import create_app
    except ImportError as error:
        raise ServerSettingsError(
            f"labelling needs FastAPI and uvicorn ({error}): pip install 'mmalign[server]'"
        ) from error
    app = create_app(session, gallery, access)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=5
    )  # fmt: skip
    listener = listen(access.host.strip("[]"), port)
    if started is not None:
        bound = listener.getsockname()[1]
        started([access.link(bound, name) for name in annotators or [""]])
    run_until_signal(uvicorn.Server(config).run, listener)
