"""A vision-language model behind any OpenAI-compatible chat server (vLLM, SGLang, ...).

Standard library only: one HTTP request per question, many at once, time-outs, retries that wait
as long as the server asks for.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vision_rewards.judge.backend import BackendError, Picture, Query, Reply, as_pil, digest
from vision_rewards.judge.choices import gather_choices, verdict_index

TOP_LOGPROBS = 20  # the most that servers of this kind offer
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_HOPELESS = {401, 403, 404}
_LONGEST_WAIT = 60.0  # seconds; a server may ask for more, a run should not stand still for it


@dataclass
class Usage:
    """What a back-end has spent so far."""

    requests: int = 0
    retries: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class _RetryError(Exception):
    """An attempt failed in a way that may pass; ``wait`` is what the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key must not follow it to another host."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class OpenAIBackend:
    """Asks a chat server.

    Args:
        base_url: up to and including the version, ``http://localhost:8000/v1``.
        model: the name under which the server knows the model.
        api_key_env: name of the environment variable that holds the key; it is read at every
            request and never stored. Unset is fine for servers without a key.
        concurrency: requests in flight, at least 1.
        timeout: seconds an attempt may take.
        retries: further attempts after rate limits, time-outs, broken connections, 5xx.
        backoff: seconds before the first retry; doubles each time, with jitter. A ``Retry-After``
            of the server has precedence.
        image_format: ``png``, or ``jpeg`` of quality 95, which some published judges were fed.
        extra: further fields of the request, such as ``{"top_p": 0.9}``.

    Attributes:
        usage: requests, retries, failures and tokens so far.

    Raises:
        ValueError: an address that is not http(s) or that holds a password, or a setting out of
            range.
    """

    deterministic = False  # batching on the server changes rounding, even at temperature 0

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 1.0,
        image_format: Literal["png", "jpeg"] = "png",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        _check_address(base_url)
        if image_format not in ("png", "jpeg"):
            raise ValueError(f"image_format={image_format!r} is unknown; use 'png' or 'jpeg'")
        if concurrency < 1 or retries < 0 or timeout <= 0 or backoff < 0:
            raise ValueError(
                "concurrency must be 1 or more, retries and backoff 0 or more, timeout above 0; "
                f"got {concurrency}, {retries}, {backoff}, {timeout}"
            )
        self.base_url, self.model, self.api_key_env = base_url.rstrip("/"), model, api_key_env
        self.concurrency, self.timeout = concurrency, timeout
        self.retries, self.backoff = retries, backoff
        self.image_format, self.extra = image_format, dict(extra or {})
        self.usage = Usage()
        self._lock = threading.Lock()

    @property
    def identity(self) -> str:
        """Model, address, format of the pictures and further fields of the request."""
        extra = f"-{digest(self.extra)}" if self.extra else ""
        return f"{self.model}@{self.base_url}-{self.image_format}{extra}"

    def networks(self) -> Sequence[nn.Module]:
        """None: the network is elsewhere."""
        return ()

    def ask(self, queries: Sequence[Query]) -> list[Reply]:
        """Answer all, ``concurrency`` at a time.

        Raises:
            BackendError: the server refuses the key or does not know the address or the model.
        """
        pool = ThreadPoolExecutor(min(self.concurrency, max(1, len(queries))))
        try:
            return list(pool.map(self._one, queries))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, query: Query) -> Reply:
        body = json.dumps(self.request(query)).encode()
        reason = ""
        for attempt in range(self.retries + 1):
            try:
                reply = read_completion(self._post(body), query)
            except _RetryError as error:
                reason = str(error)
                if attempt < self.retries:
                    self._count(retries=1)
                    time.sleep(self._wait(attempt, error.wait))
                continue
            except ValueError as error:  # a 4xx that is this question's own fault
                reason = str(error)
                break
            self._count(tokens_in=reply.tokens_in, tokens_out=reply.tokens_out)
            return reply
        self._count(failed=1)
        return Reply(error=reason)

    def _wait(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, _LONGEST_WAIT)
        # Jitter keeps many clients that failed together from coming back together.
        return min(self.backoff * 2**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0)

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.usage, name, getattr(self.usage, name) + amount)

    def request(self, query: Query) -> dict[str, Any]:
        """The body of the request for one question."""
        pictures = [
            {"type": "image_url", "image_url": {"url": data_url(p, self.image_format)}}
            for p in query.images
        ]
        messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": query.text}]}]
        if query.system:
            messages.insert(0, {"role": "system", "content": query.system})  # type: ignore[dict-item]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": query.temperature,
            "max_tokens": query.max_tokens,
            "seed": query.seed,
        }
        if query.choices:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return body | self.extra

    def _post(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.api_key_env, "")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.base_url}/chat/completions", body, headers)
        self._count(requests=1)
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure(error) from error
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs included
            reason = getattr(error, "reason", None) or error
            raise _RetryError(f"{self.base_url}: {type(error).__name__}: {reason}") from error
        except ValueError as error:
            raise _RetryError(f"{self.base_url} sent something that is not JSON") from error

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        said = error.read(2000).decode("utf-8", "replace").strip()
        text = f"{self.base_url} answered {error.code} for model {self.model!r}: {said[:500]}"
        if error.code in _TRY_AGAIN:
            return _RetryError(text, retry_after(error.headers.get("Retry-After")))
        if 300 <= error.code < 400:
            to = error.headers.get("Location")
            return BackendError(f"{text}; it redirects to {to!r}: give that address as url")
        if error.code in _HOPELESS:
            key = "set" if os.environ.get(self.api_key_env) else "not set"
            return BackendError(f"{text} (key variable {self.api_key_env} is {key})")
        return ValueError(text)


def _check_address(base_url: str) -> None:
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"url {base_url!r} must look like http://localhost:8000/v1")
    if parts.username or parts.password:
        raise ValueError(
            "a url must not hold a password; put the key into the variable api_key_env"
        )


def data_url(picture: Picture, image_format: str = "png") -> str:
    """A picture as a ``data:`` address."""
    buffer = io.BytesIO()
    options = {"quality": 95} if image_format == "jpeg" else {}
    as_pil(picture).save(buffer, format=image_format.upper(), **options)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{image_format};base64,{text}"


def retry_after(header: str | None) -> float | None:
    """Seconds asked for by a ``Retry-After`` header (seconds or a date); ``None`` without one."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def read_completion(body: Any, query: Query) -> Reply:
    """The reply in the body of a chat completion.

    Raises:
        _RetryError: the body is not a chat completion.
    """
    try:
        choice = body["choices"][0]
        message = choice["message"]
        # Half a character of an answer that was cut off could not be written anywhere.
        text = (message.get("content") or "").encode("utf-8", "replace").decode()
        usage = body.get("usage") or {}
        reason = choice.get("finish_reason")
        return Reply(
            text=text.strip() or str(message.get("refusal") or "").strip(),
            refused=bool(message.get("refusal")) or reason == "content_filter",
            truncated=reason == "length",
            choice_log_probs=_choice_log_probs(choice.get("logprobs"), query),
            tokens_in=int(usage.get("prompt_tokens") or 0),
            tokens_out=int(usage.get("completion_tokens") or 0),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        said = json.dumps(body)[:300]
        raise _RetryError(f"the server's answer is no chat completion: {said}") from error


def _choice_log_probs(logprobs: Any, query: Query) -> dict[str, float] | None:
    if not query.choices or not logprobs:
        return None
    tokens = logprobs["content"]
    index = verdict_index([t["token"] for t in tokens], query.verdict_after)
    if index is None:
        return None
    top = [(t["token"], float(t["logprob"])) for t in tokens[index].get("top_logprobs") or ()]
    return gather_choices(top, query.choices)
