"""The block on network use works."""

from __future__ import annotations

import socket
import urllib.request

import pytest


def test_the_outside_is_blocked():
    with pytest.raises(AssertionError, match="tried to"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(AssertionError, match="tried to resolve"):
        urllib.request.urlopen("http://example.invalid/", timeout=1)
    with socket.socket() as client, pytest.raises(AssertionError, match="tried to connect"):
        client.connect_ex(("192.0.2.1", 80))


def test_this_machine_is_not():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_the_hub_is_offline():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
