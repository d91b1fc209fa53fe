"""Servers of one reward: who is asked, what an answer means, when to try again, when to give up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mmalign.runtime.log import say
from vision_rewards.guard import RewardUnavailableError
from vision_rewards.serving.wire import VERSION

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0  # seconds between rounds; doubled from one to the other
_AGAIN = (408, 425, 429, 502, 503, 504)


class RemoteRewardError(RuntimeError):
    """The reward on the server raised, or the server found the request wanting."""


class ImpossibleCallError(ValueError):
    """A call that the server's reward or limits can never take."""


class NoAnswerError(Exception):
    """One attempt at one server came to nothing, and another may not."""


def parse_addresses(address: str | Sequence[str]) -> list[str]:
    """Base URLs of one or several (comma separated) addresses.

    Raises:
        ValueError: none, one twice, or one that is not plain ``http(s)://host[:port][/path]``.
    """
    given = address.split(",") if isinstance(address, str) else list(address)
    urls = [url.strip().rstrip("/") for url in given]
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(
                f"reward server {url!r} is no address; write remote:http://host:port, or several "
                "with commas between"
            )
        if parts.username or parts.password:
            raise ValueError("put the token into the environment, not into the server's address")
    if len(set(urls)) != len(urls):
        raise ValueError(f"a reward server is named twice: {', '.join(urls)}")
    return urls


class Replica:
    """One server.

    Args:
        url: base address.
        token: bearer token, if it asks for one.
        timeout: seconds one request may take.
    """

    def __init__(self, url: str, token: str | None, timeout: float) -> None:
        import httpx

        self.url = url
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        limit = httpx.Timeout(timeout, connect=min(timeout, 10.0))
        # No redirects (the default): a token must not follow one to another host.
        self._client = httpx.Client(base_url=url, headers=headers, timeout=limit)

    def reachable(self) -> None:
        """Return if the server takes requests; errors as :meth:`post`."""
        self._send("GET", "/health")

    def declaration(self) -> dict[str, Any]:
        """What the server says it serves; errors as :meth:`post`."""
        try:
            said = json.loads(self._send("GET", "/identity"))
            if said["wire"] == VERSION and {"info", "identity", "limits"} <= said.keys():
                return dict(said)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RewardUnavailableError(f"{self.url} is no mmalign reward server") from error
        raise RewardUnavailableError(
            f"reward server {self.url} speaks version {said['wire']!r} of the format, this side "
            f"{VERSION!r}; bring both to the same version of mmalign"
        )

    def post(self, path: str, body: bytes, content_type: str) -> bytes:
        """Body of a successful POST.

        Raises:
            NoAnswerError: no connection, no time left, or a server that is busy or closing.
            RewardUnavailableError: it refuses the token, or is no reward server.
            ImpossibleCallError: the call can never be answered. RemoteRewardError: the reward
                raised.
        """
        return self._send("POST", path, content=body, headers={"Content-Type": content_type})

    def _send(self, method: str, path: str, **options: Any) -> bytes:
        import httpx

        try:
            response = self._client.request(method, path, **options)
        except httpx.TransportError as error:
            reason = str(error) or "no reason given"
            raise NoAnswerError(f"{self.url}: {type(error).__name__}: {reason}") from error
        if response.status_code == 200:
            return bytes(response.content)
        raise self._error(response.status_code, response.content)

    def _error(self, status: int, body: bytes) -> Exception:
        try:
            code, message = (str(json.loads(body)["error"][k]) for k in ("code", "message"))
        except (ValueError, KeyError, TypeError):
            code, message = "", f"HTTP status {status}"
        text = f"{self.url}: {message}"
        if status in _AGAIN:
            return NoAnswerError(text)
        if code in ("impossible_call", "too_large"):
            return ImpossibleCallError(f"reward server {text}")
        if code in ("reward_failed", "bad_request"):
            return RemoteRewardError(f"reward server {text}")
        if not code and status >= 500:  # a gateway's own page
            return NoAnswerError(text)
        return RewardUnavailableError(f"reward server {text}")


class Replicas:
    """Several servers of the same reward.

    Args:
        replicas: at least one.
        wait: seconds of trying again before giving up.
    """

    def __init__(self, replicas: Sequence[Replica], wait: float) -> None:
        self.replicas, self.wait = list(replicas), wait
        self._lock = threading.Lock()
        self._silent: set[str] = set()

    def __len__(self) -> int:
        return len(self.replicas)

    def __str__(self) -> str:
        return ", ".join(replica.url for replica in self.replicas)

    def declaration(self) -> dict[str, Any]:
        """What the servers say they serve; the first answer, once all that answer agree.

        Raises:
            ValueError: two serve different rewards. RewardUnavailableError: nobody answers.
        """
        self._persist(Replica.reachable, 0)
        answers: dict[str, dict[str, Any]] = {}
        for replica in self.replicas:
            try:
                answers[replica.url] = replica.declaration()
            except NoAnswerError as error:  # checked later, by the identity in its first score
                self._missed(replica, error)
        if not answers:
            raise RewardUnavailableError(f"no reward server answers for what it serves: {self}")
        (first, said), *others = answers.items()
        for url, other in others:
            if other["identity"] != said["identity"]:
                raise ValueError(
                    f"reward servers differ: {first} serves {said['identity']!r}, {url} serves "
                    f"{other['identity']!r}; replicas must serve the same"
                )
        return said

    def post(
        self, path: str, body: bytes, content_type: str, number: int, read: Callable[[bytes], T]
    ) -> T:
        """``read`` of the answer to a request, whose ``number`` says which server is asked first.

        Raises:
            RewardUnavailableError: nobody answered for ``wait`` seconds. What
                :meth:`Replica.post` and ``read`` raise beyond that passes through.
        """
        return self._persist(lambda r: read(r.post(path, body, content_type)), number)

    def _persist(self, ask: Callable[[Replica], T], number: int) -> T:
        start, pause = time.monotonic(), FIRST_PAUSE
        while True:
            for k in range(len(self.replicas)):
                replica = self.replicas[(number + k) % len(self.replicas)]
                try:
                    answer = ask(replica)
                except NoAnswerError as error:
                    last = error
                    self._missed(replica, error)
                else:
                    self._heard(replica)
                    return answer
            left = start + self.wait - time.monotonic()
            if left <= 0:
                raise RewardUnavailableError(
                    f"no reward server answered for {self.wait:g} s: {last}. Nothing was scored; "
                    "start the server again and repeat the command (a training run resumes)"
                ) from last
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _missed(self, replica: Replica, error: NoAnswerError) -> None:
        with self._lock:
            first = replica.url not in self._silent
            self._silent.add(replica.url)
        if first:
            say(f"reward server {error}; trying again for up to {self.wait:g} s")

    def _heard(self, replica: Replica) -> None:
        with self._lock:
            back = replica.url in self._silent
            self._silent.discard(replica.url)
        if back:
            say(f"reward server {replica.url} answers again")
