"""A real chat server in a thread, whose answers a test writes."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

COLORS = {"red": 0, "green": 1, "blue": 2}


class Chat:
    """One request as the server sees it."""

    def __init__(self, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.body, self.headers = body, headers
        content = body["messages"][-1]["content"]
        self.text = "".join(p["text"] for p in content if p["type"] == "text")
        urls = [p["image_url"]["url"] for p in content if p["type"] == "image_url"]
        self.kinds = [u.split(";")[0] for u in urls]
        self.images = [Image.open(io.BytesIO(base64.b64decode(u.split(",")[1]))) for u in urls]

    def asked(self) -> str:
        """The colour that the text between the prompt tags asks for."""
        quoted = re.search(r"<prompt>(.*?)</prompt>", self.text, re.DOTALL)
        text = quoted[1] if quoted else self.text
        return min((c for c in COLORS if c in text), key=text.index, default="")

    def fits(self, image: int = 0) -> bool:
        """Whether a picture has the colour asked for."""
        pixel = self.images[image].convert("RGB").resize((1, 1)).getpixel((0, 0))
        return bool(self.asked()) and pixel.index(max(pixel)) == COLORS[self.asked()]


def said(text: str | None, **choice: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text, **choice.pop("message", {})}
    row = {"index": 0, "message": message, "finish_reason": "stop", **choice}
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    return {"id": "x", "object": "chat.completion", "choices": [row], "usage": usage}


def token(text: str, top: dict[str, float] | None = None) -> dict[str, Any]:
    """One token of a completion with its likely alternatives."""
    top = top or {text: -0.1}
    rows = [{"token": t, "logprob": p} for t, p in top.items()]
    return {"token": text, "logprob": top.get(text, -0.1), "top_logprobs": rows}


class ChatServer:
    """A server on this machine whose answers come from ``respond``.

    ``respond(chat)`` returns a body, text, or ``(status, body, headers)``.
    """

    said, token = staticmethod(said), staticmethod(token)

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        self.respond: Callable[[Chat], Any] = lambda chat: "yes"
        self.seen: list[Chat] = []
        self.running = self.most = 0
        self.lock = threading.Lock()

    def handle(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any, Any]:
        """Status, body and headers for one request."""
        chat = Chat(body, headers)
        with self.lock:
            self.seen.append(chat)
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            answer = self.respond(chat)
        finally:
            with self.lock:
                self.running -= 1
        if isinstance(answer, tuple):
            return answer
        return 200, said(answer) if isinstance(answer, str) else answer, {}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # of five, a sixth connection at once waits a second


@contextmanager
def serving() -> Iterator[ChatServer]:
    """A running server; set ``chat.respond``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            known = self.path == "/v1/chat/completions"
            status, body, headers = (
                site.handle(json.loads(raw), dict(self.headers)) if known else (404, "no", {})
            )
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client has given up

        def log_message(self, *args: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    site = ChatServer(server)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
