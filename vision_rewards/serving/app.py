"""The HTTP side of a reward server. Imported by the server only: it needs FastAPI."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

import mmalign
from mmalign.protocols import RewardModel
from mmalign.runtime.versions import package_version
from mmalign.types import Score
from vision_rewards.serving import wire
from vision_rewards.serving.metrics import Metrics
from vision_rewards.serving.safety import Limits, ServerSettings, WireError, authorised
from vision_rewards.serving.worker import ServerClosedError, Worker

_VERSIONS = ("torch", "torchvision", "transformers", "open_clip_torch")


class Refusal(Exception):
    """A request that gets an error instead of scores.

    Args:
        status: HTTP status.
        code: one word for programs.
        message: for people: what was wrong, what is allowed.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message

    def response(self) -> Response:
        """The refusal as JSON ``{"error": {"code", "message"}}``."""
        headers = {"Retry-After": "1"} if self.status == 503 else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        body = {"error": {"code": self.code, "message": self.message}}
        return JSONResponse(body, self.status, headers)


class Service:
    """The endpoints, over one worker."""

    def __init__(self, reward: RewardModel, settings: ServerSettings) -> None:
        self.reward, self.settings = reward, settings
        self.metrics = Metrics()
        self.worker = Worker(
            reward,
            batch=settings.batch,
            merge=settings.merge,
            device=settings.device,
            metrics=self.metrics,
        )
        self.open = 0

    async def score(self, request: Request) -> Response:
        """POST /score: scores of a batch, in the form the request came in."""
        start = time.perf_counter()
        self.open += 1
        try:
            response = await self._score(request)
        except Refusal as refusal:
            response = refusal.response()
        finally:
            self.open -= 1
        self.metrics.request(response.status_code, time.perf_counter() - start)
        return response

    async def _score(self, request: Request) -> Response:
        self._admit(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in wire.CONTENT_TYPES or "content-encoding" in request.headers:
            allowed = " or ".join(wire.CONTENT_TYPES)
            raise Refusal(415, "content_type", f"send {allowed}, not compressed; got {kind!r}")
        try:
            body = await _read(request, self.settings.limits)
            call = await asyncio.to_thread(wire.decode_call, body, kind, self.settings.limits)
        except WireError as error:
            code = "too_large" if error.status == 413 else "bad_request"
            raise Refusal(error.status, code, str(error)) from error
        del body  # the decoded call is all that has to wait in the queue
        score = await self._answer(call)
        return Response(await asyncio.to_thread(wire.encode_score, score, kind), media_type=kind)

    async def _answer(self, call: wire.Call) -> Score:
        info = self.reward.info
        if call.media.kind not in info.media:
            takes = ", ".join(info.media)
            message = f"reward {info.name!r} takes {takes}, got a {call.media.kind}"
            raise Refusal(422, "impossible_call", message)
        try:
            return await asyncio.wrap_future(self.worker.submit(call))
        except ServerClosedError as error:
            raise Refusal(503, "closing", str(error)) from error
        except Exception as error:  # the reward's own: it must reach the caller as what it is
            raise Refusal(500, "reward_failed", f"{type(error).__name__}: {error}") from error

    def _admit(self, request: Request) -> None:
        """Token and queue, before a byte of the body is read."""
        self._authorise(request)
        if not self.worker.alive:
            raise Refusal(503, "closing", "the reward server is shutting down")
        if self.open > self.settings.max_waiting:
            raise Refusal(503, "busy", f"{self.settings.max_waiting} requests are waiting already")

    def _authorise(self, request: Request) -> None:
        if not authorised(request.headers.get("authorization"), self.settings.token):
            raise Refusal(401, "token", "this server asks for a token: Authorization: Bearer ...")

    async def health(self, request: Request) -> Response:
        """GET /health: whether requests are answered. Asks for no token and tells nothing else."""
        if not self.worker.alive:
            return JSONResponse({"status": "closing"}, 503)
        return JSONResponse({"status": "ok"})

    async def identity(self, request: Request) -> Response:
        """GET /identity: what is served, by which versions, under which limits."""
        self._authorise(request)
        versions = {name: package_version(name) for name in _VERSIONS}
        return JSONResponse(
            {
                "wire": wire.VERSION,
                "info": asdict(self.reward.info),
                "identity": self.reward.identity,
                "weights": dict(getattr(self.reward, "weights", {})),  # of a composition's parts
                "whole_batch": bool(getattr(self.reward, "whole_batch", False)),
                "limits": asdict(self.settings.limits),
                "versions": {"mmalign": mmalign.__version__, **versions},
            }
        )

    async def report(self, request: Request) -> Response:
        """GET /metrics: counters for Prometheus."""
        self._authorise(request)
        labels = {"name": self.reward.info.name, "identity": self.reward.identity}
        text = self.metrics.render(self.worker.waiting, labels)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _read(request: Request, limits: Limits) -> bytes:
    """The body; refused by its declared length, or as soon as it has grown too long."""
    declared = request.headers.get("content-length", "0")
    limits.check_bytes(int(declared) if declared.isdecimal() else 0)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        limits.check_bytes(len(body))
    return bytes(body)


def create_app(reward: RewardModel, settings: ServerSettings | None = None) -> FastAPI:
    """The ASGI application; its worker ends, with its queue done, when the application does."""
    service = Service(reward, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    # No pages of documentation: they would answer without the token and load scripts from afar.
    app = FastAPI(title="mmalign reward", openapi_url=None, lifespan=lifespan)
    app.state.service = service
    routes: dict[str, tuple[str, Callable[[Request], Awaitable[Any]]]] = {
        "/score": ("POST", service.score),
        "/health": ("GET", service.health),
        "/identity": ("GET", service.identity),
        "/metrics": ("GET", service.report),
    }
    for path, (method, handler) in routes.items():
        app.add_api_route(path, handler, methods=[method], response_model=None)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return error.response()

    return app
