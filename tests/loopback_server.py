"""A web server on loopback with ranges, that can be told to misbehave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """Files by path, and how to treat requests for them.

    Attributes:
        files: What there is.
        cuts: For a path, after how many bytes each of the next answers is cut.
        ranges: Whether the server knows ranges.
        html: Paths that answer with a web page.
        tag: The version of all files.
        requests: (path, Range header) of each request.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = {}
        self.ranges = True
        self.html: set[str] = set()
        self.tag = '"one"'
        self.requests: list[tuple[str, str | None]] = []
        self.base = ""


@contextmanager
def serve() -> Iterator[Site]:
    """A running server."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            site.requests.append((self.path, asked))
            if self.path in site.html:
                self._answer(200, b"<html>quota exceeded</html>", {"Content-Type": "text/html"})
            elif self.path not in site.files:
                self._answer(404, b"", {})
            else:
                self._file(site.files[self.path], asked)

        def _file(self, content: bytes, asked: str | None) -> None:
            headers = {"Content-Type": "application/octet-stream", "ETag": site.tag}
            start = 0
            if asked and site.ranges and self.headers.get("If-Range") in (None, site.tag):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    self._answer(416, b"", {})
                    return
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(206 if start else 200, content[start:], headers)

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            cuts = site.cuts.get(self.path, [])
            self.wfile.write(body[: cuts.pop(0)] if cuts else body)
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    site.base = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
