"""The HTTP side of labelling. Imported by the server only: it needs FastAPI."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from mmalign.pictures import PictureError
from mmalign.runtime.files import StorageError
from vision_rewards.labelling.agreement import agreement
from vision_rewards.labelling.gallery import Gallery
from vision_rewards.labelling.order import Turn
from vision_rewards.labelling.server import Access
from vision_rewards.labelling.session import Session, SessionError, name_of_annotator, side_of
from vision_rewards.serving.safety import WireError, authorised, parse_json

LONGEST_BODY = 16_384  # bytes of a request: a decision takes about 200
_AHEAD = 2  # showings whose pictures the page loads early

Handler = Callable[[Request], Awaitable[Response]]


class Refusal(Exception):
    """A request that is not served; ``message`` is shown on the page."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Service:
    """The endpoints."""

    def __init__(self, session: Session, gallery: Gallery, access: Access) -> None:
        self.session, self.gallery, self.access = session, gallery, access
        self.root = session.file.path.parent.resolve()
        self.page = files("vision_rewards.labelling").joinpath("page.html").read_text("utf-8")
        self.policy = content_policy(self.page)

    async def html(self, request: Request) -> Response:
        """GET / and /agreement: the page. It holds no data, so it asks for no token."""
        return HTMLResponse(self.page, headers={"Content-Security-Policy": self.policy})

    async def state(self, request: Request) -> Response:
        """GET /api/state?user=: where this annotator is."""
        return JSONResponse(self._state(name_of_annotator(request.query_params.get("user"))))

    async def decide(self, request: Request) -> Response:
        """POST /api/decide: one decision, written before the answer; then where they are."""
        body = await _body(request)
        user = name_of_annotator(body.get("user"))
        given = (str(body.get("task")), str(body.get("choice")), body.get("seconds"))
        done = await asyncio.to_thread(self.session.decide, user, *given)
        return JSONResponse({"recorded": done, **self._state(user)})

    async def undo(self, request: Request) -> Response:
        """POST /api/undo: take back the latest decision, if it is the one named."""
        body = await _body(request)
        user = name_of_annotator(body.get("user"))
        done = await asyncio.to_thread(self.session.undo, user, str(body.get("task")))
        return JSONResponse({"recorded": done, **self._state(user)})

    async def image(self, request: Request) -> Response:
        """GET /api/image/N: a picture."""
        number = request.path_params["number"]
        data, kind = await asyncio.to_thread(self.gallery.read, number)
        return Response(data, media_type=kind)

    async def statistics(self, request: Request) -> Response:
        """GET /api/agreement: all that :func:`~vision_rewards.labelling.agreement.agreement`
        finds in the labels so far."""
        rows = self.session.rows()
        return JSONResponse(await asyncio.to_thread(agreement, rows))

    def _state(self, user: str) -> dict[str, Any]:
        with self.session.lock:  # another tab of the same annotator may be writing
            person = self.session.annotator(user)
            waiting = [self._showing(turn) for turn in person.waiting(1 + _AHEAD)]
            last = person.last
            return {
                "user": user,
                "done": person.done,
                "total": len(person.turns),
                "pace": person.pace(),
                "task": waiting[0] if waiting else None,
                "ahead": [n for task in waiting[1:] for n in (task["left"], task["right"])],
                "last": last and {"task": last["decision"], "choice": side_of(last)},
            }

    def _showing(self, turn: Turn) -> dict[str, Any]:
        pair = self.session.pairs[turn.pair]
        a, b = (self.gallery.number[file] for file in pair.files(self.root))
        left, right = (b, a) if turn.swapped else (a, b)
        return {"id": turn.id, "prompt": pair.prompt, "left": left, "right": right}

    def guarded(self, handler: Handler, open_to_all: bool) -> Handler:
        """``handler`` behind the checks of host and token, its errors as JSON."""

        async def answer(request: Request) -> Response:
            try:
                self._admit(request, open_to_all)
                return await handler(request)
            except Exception as error:
                refusal = _refusal(error)
                if refusal is None:
                    raise
                return JSONResponse({"error": refusal.message}, refusal.status)

        return answer

    def _admit(self, request: Request, open_to_all: bool) -> None:
        host = request.headers.get("host")
        if not self.access.admits(host):
            raise Refusal(
                421,
                f"this server is not {host!r}; if it is meant to be, start it with --allow-host",
            )
        if open_to_all:
            return
        if not authorised(request.headers.get("authorization"), self.access.token):
            raise Refusal(401, "the link is not valid here; open the one the server printed")


async def _body(request: Request) -> dict[str, Any]:
    """A JSON object. The content type is insisted on: a form of another site cannot send it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"send application/json, got {kind!r}")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > LONGEST_BODY:
            raise Refusal(413, f"the request is longer than {LONGEST_BODY} bytes")
    value = parse_json(bytes(data), "the request")
    if not isinstance(value, dict):
        raise Refusal(400, "the request must be a JSON object")
    return value


def _refusal(error: Exception) -> Refusal | None:
    """What a caller is told of an error; ``None`` for one that is a bug."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, (SessionError, WireError)):
        return Refusal(400, str(error))
    if isinstance(error, (LookupError, PictureError)):
        return Refusal(404, str(error))
    if isinstance(error, StorageError):
        return Refusal(507, f"{error}; the decision was not saved and does not count")
    return None


def content_policy(page: str) -> str:
    """Only the page's own script and style run; pictures come through the script; no forms,
    frames or other addresses."""

    def digests(tag: str) -> str:
        blocks = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        made = (base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() for b in blocks)
        return " ".join(f"'sha256-{d}'" for d in made)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; "
        "connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def create_app(session: Session, gallery: Gallery, access: Access) -> FastAPI:
    """The ASGI application."""
    service = Service(session, gallery, access)
    # No pages of documentation: they would answer without the token and load scripts from afar.
    app = FastAPI(title="mmalign label", openapi_url=None)
    routes: list[tuple[str, str, Handler, bool]] = [
        ("GET", "/", service.html, True),
        ("GET", "/agreement", service.html, True),
        ("GET", "/api/state", service.state, False),
        ("POST", "/api/decide", service.decide, False),
        ("POST", "/api/undo", service.undo, False),
        ("GET", "/api/image/{number:int}", service.image, False),
        ("GET", "/api/agreement", service.statistics, False),
    ]
    for method, path, handler, open_to_all in routes:
        guarded = service.guarded(handler, open_to_all)
        app.add_api_route(path, guarded, methods=[method], response_model=None)

    @app.middleware("http")
    async def headers(
        request: Request, proceed: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await proceed(request)
        response.headers.update(_HEADERS)
        return response

    return app
