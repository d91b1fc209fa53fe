"""The studio's HTTP side. Imported by the server only: it needs FastAPI.

The page is made of three files of this package and asks no other machine for anything.  It runs
code that a person names (a reward may be a Python file), so nobody else may talk to it: the server
listens on this machine alone, answers only to this machine's names, and wants the key that it puts
into the page with every call, which no other page in the browser can read.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from mmalign.registry import unknown
from mmalign.studio.choices import choices
from mmalign.studio.jobs import Job, Studio, Wish

FILES = {"studio.js": "text/javascript", "studio.css": "text/css"}
NAMES = ("127.0.0.1", "localhost", "[::1]")  # of this machine, as browsers write them
LONGEST = 1 << 16  # bytes of a request
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Service:
    """The endpoints, over one studio."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.key = studio, secrets.token_urlsafe(24)
        folder = Path(__file__).parent
        self.texts = {n: (folder / n).read_text(encoding="utf-8") for n in (*FILES, "page.html")}

    async def page(self, request: Request) -> Response:
        """GET /: the page, with the key in it."""
        return HTMLResponse(self.texts["page.html"].replace("{{key}}", self.key))

    async def file(self, name: str) -> Response:
        """GET /studio.js and /studio.css."""
        if name not in FILES:
            return JSONResponse({"message": f"there is no {name!r} here"}, 404)
        return Response(self.texts[name], media_type=FILES[name])

    async def choices(self, request: Request) -> Response:
        """GET /api/choices: what the form offers."""
        return JSONResponse(await asyncio.to_thread(choices))

    async def start(self, request: Request) -> Response:
        """POST /api/runs: begin a run; its number."""
        body = await request.body()
        if len(body) > LONGEST:
            return JSONResponse({"message": f"more than {LONGEST} bytes"}, 413)
        try:
            wish = wish_of(json.loads(body))
        except (ValueError, TypeError) as error:
            return JSONResponse({"message": str(error)}, 422)
        return JSONResponse({"number": self.studio.start(wish).number}, 202)

    async def events(self, number: int) -> Response:
        """GET /api/runs/NUMBER: everything said about a run, one JSON object a line, to its end."""
        job = self.studio.jobs.get(number)
        if job is None:
            return JSONResponse({"message": f"there is no run {number}"}, 404)
        return StreamingResponse(_lines(job), media_type="application/x-ndjson")

    async def stop(self, number: int) -> Response:
        """POST /api/runs/NUMBER/stop: end it at its next step."""
        job = self.studio.jobs.get(number)
        if job is None:
            return JSONResponse({"message": f"there is no run {number}"}, 404)
        job.stopped.set()
        return JSONResponse({"number": number})

    def refusal(self, request: Request) -> str:
        """Why a request is not answered; empty where it is."""
        host = request.headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in NAMES:
            return f"this studio answers to {', '.join(NAMES)} only, not to {host!r}"
        given = request.headers.get("x-studio-key", "")
        if request.url.path.startswith("/api/") and not hmac.compare_digest(given, self.key):
            return "the key is missing or old: load the page again"
        return ""


def wish_of(body: Any) -> Wish:
    """What a request asks for.

    Raises:
        ValueError: not an object, an unknown or missing name, or a value of another type.
    """
    if not isinstance(body, dict):
        raise ValueError("send a JSON object")
    known = [f.name for f in fields(Wish)]
    for name, value in body.items():
        if name not in known:
            raise unknown("wish", name, known)
        if name == "options":
            good = isinstance(value, list) and all(isinstance(v, str) for v in value)
        else:
            good = type(value) is (int if name == "seed" else str)
        if not good:
            raise ValueError(f"{name} has the wrong type: {value!r}")
    if "prompt" not in body:
        raise ValueError("the prompt is missing")
    options = {"options": tuple(body.get("options", ()))}
    return Wish(**{**body, **options})


def _lines(job: Job) -> Iterator[str]:
    for event in job.listen():
        yield "\n" if event is None else json.dumps(event, allow_nan=False) + "\n"


def create_app(studio: Studio) -> FastAPI:
    """The ASGI application; runs are stopped when it ends."""
    service = Service(studio)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        studio.close()

    app = FastAPI(title="mmalign studio", openapi_url=None, lifespan=lifespan)
    app.state.service = service

    @app.middleware("http")
    async def guarded(
        request: Request, answer: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        refused = service.refusal(request)
        response = JSONResponse({"message": refused}, 403) if refused else await answer(request)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response

    routes: dict[str, tuple[str, Callable[..., Awaitable[Any]]]] = {
        "/": ("GET", service.page),
        "/api/choices": ("GET", service.choices),
        "/api/runs": ("POST", service.start),
        "/api/runs/{number}": ("GET", service.events),
        "/api/runs/{number}/stop": ("POST", service.stop),
        "/{name}": ("GET", service.file),
    }
    for path, (method, handler) in routes.items():
        app.add_api_route(path, handler, methods=[method], response_model=None)
    return app
