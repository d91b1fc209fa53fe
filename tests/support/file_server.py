"""A local HTTP server of files that can break off, refuse and answer ranges, and remembers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Files:
    """What the server has and how it behaves.

    ``cut`` holds, for a path, after how many bytes the next replies break off; ``status`` replies
    to give before serving; ``asked`` every (path, Range header).
    """

    content: dict[str, bytes]
    cut: dict[str, list[int]] = field(default_factory=dict)
    status: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve_files(content: Mapping[str, bytes]) -> Iterator[Files]:
    """A running server of ``content`` (path to bytes) on a free port of this machine."""
    files = Files(dict(content))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            files.asked.append((self.path, wanted))
            if queue := files.status.get(self.path):
                self.send_error(queue.pop(0))
            elif self.path not in files.content:
                self.send_error(404)
            else:
                self._send(files.content[self.path], wanted)

        def _send(self, body: bytes, wanted: str | None) -> None:
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if not files.ranges:
                start = 0
            if start and start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            rest = body[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            queue = files.cut.get(self.path)
            self.wfile.write(rest[: queue.pop(0)] if queue else rest)
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    files.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
