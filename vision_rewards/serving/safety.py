"""Limits and refusals: what a server accepts from callers it knows nothing about."""

from __future__ import annotations

import hmac
import ipaddress
import json
from dataclasses import dataclass, field, fields
from typing import Any


class WireError(ValueError):
    """A body that cannot be read; the message is for whoever sent it."""

    status = 400


class TooLargeError(WireError):
    """A body beyond the server's limits."""

    status = 413


class ServerSettingsError(ValueError):
    """A server that must not be started like this."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may hold.

    Attributes:
        max_images: pictures (or videos).
        max_pixels: pixels of all pictures and frames together, known before any is decoded: a
            small PNG can stand for gigabytes.
        max_bytes: bytes of the body.

    Raises:
        ServerSettingsError: a limit below 1.
    """

    max_images: int = 256
    max_pixels: int = 1 << 26
    max_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value < 1:
                raise ServerSettingsError(f"{limit.name} is {value}; it must be at least 1")

    def check_images(self, count: int) -> None:
        """Raise :class:`TooLargeError` beyond ``max_images``."""
        if count > self.max_images:
            raise TooLargeError(f"{count} pictures in one request; at most {self.max_images}")

    def check_bytes(self, count: int) -> None:
        """Raise :class:`TooLargeError` beyond ``max_bytes``."""
        if count > self.max_bytes:
            raise TooLargeError(f"a body of {count} bytes or more; at most {self.max_bytes}")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a reward is served.

    Attributes:
        token: bearer token callers must show; ``None`` asks for none.
        batch, merge: see :class:`~vision_rewards.serving.worker.Worker`.
        max_waiting: requests read or queued at once; beyond it callers are told to come back.
        device: where the reward scores.
    """

    token: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)
    batch: int = 64
    merge: bool = True
    max_waiting: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch", "max_waiting"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ServerSettingsError(f"{name} is {value}; it must be at least 1")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ServerSettingsError("the token must be printable ASCII, to fit into a header")


class Budget:
    """The pixels one request may still decode."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pixels = 0

    def spend(self, count: int) -> None:
        """Account for ``count`` pixels before they are decoded.

        Raises:
            TooLargeError: the request as a whole passes ``max_pixels``.
        """
        self.pixels += count
        if self.pixels > self.limits.max_pixels:
            raise TooLargeError(
                f"{self.pixels} pixels or more in one request; at most {self.limits.max_pixels}. "
                "Send fewer pictures at once, or smaller ones"
            )


def parse_json(text: str | bytes, what: str) -> Any:
    """``text`` as JSON.

    Raises:
        WireError: it is not JSON, or nested beyond reason.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON: {error}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, token: str | None) -> None:
    """Refuse to be reachable by others without a token.

    Raises:
        ServerSettingsError: ``host`` is not loopback and there is no token.
    """
    if token is None and not is_loopback(host):
        raise ServerSettingsError(
            f"host {host!r} is reachable from other machines and there is no token: set one in "
            "the variable that --token-env names, or bind 127.0.0.1"
        )


def authorised(header: str | None, token: str | None) -> bool:
    """Whether an ``Authorization`` header carries the token; takes the same time for any guess."""
    if token is None:
        return True
    expected = f"Bearer {token}".encode()
    return hmac.compare_digest((header or "").encode("utf-8", "surrogateescape"), expected)
