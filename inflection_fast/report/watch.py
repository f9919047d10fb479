"""A server of the page of a training run, for this machine alone.

It reads the files of the run folder, so the training is not affected, and may run on another machine with a shared
disk. Files are checked for changes when a page asks, at most once a second.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from inflection_fast.report.content import Content
from inflection_fast.report.single_page import State, binary, html, state

__all__ = ["PORT", "Server", "command"]

PORT = 8765
LOOPBACK = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")  # accepted host names, against DNS rebinding
LEAST_SECONDS = 1.0  # between two checks of the files
PATIENCE_SECONDS = 20.0  # timeout of a request


class Server(ThreadingHTTPServer):
    """Serves one run on the loopback address; `port` 0 takes a free one. `OSError` if the port is in use."""

    daemon_threads = True

    def __init__(self, folder: str | Path, port: int = PORT):
        self.content = Content(Path(folder))
        self.content.update()
        self._lock = threading.Lock()
        self._state: State | None = None
        self._looked = 0.0
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/"

    def now(self) -> State:
        """The page in the present state of the files. `ValueError` if one cannot be read."""
        with self._lock:
            if self._state is None or time.monotonic() - self._looked >= LEAST_SECONDS:
                if self.content.update() or self._state is None:
                    self._state = state(self.content)
                self._looked = time.monotonic()
            return self._state


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = PATIENCE_SECONDS

    def do_GET(self) -> None:
        if self.headers.get("Host", "").rsplit(":", 1)[0] not in NAMES:
            self._send(403, "text/plain", b"This page is served to 127.0.0.1 and localhost only.")
            return
        asked = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(asked.query).items()}
        answers = {"/": self._page, "/state": self._what_is_new, "/array": self._array}
        if asked.path not in answers:
            self._send(404, "text/plain", b"There is no such page.")
            return
        try:
            answers[asked.path](query)
        except (ValueError, OSError) as error:
            if isinstance(error, (ConnectionError, TimeoutError)):
                self.close_connection = True  # the page was closed
                return
            self._send(500, "text/plain", str(error).encode())

    def _page(self, query: dict[str, str]) -> None:
        self._send(200, "text/html; charset=utf-8", html(self.server.now(), live=True).encode())

    def _what_is_new(self, query: dict[str, str]) -> None:
        now = self.server.now()
        if query.get("version") == str(now.manifest["version"]):
            self._send(204, "application/json", b"")
        else:
            text = json.dumps(now.manifest, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            self._send(200, "application/json", text.encode())

    def _array(self, query: dict[str, str]) -> None:
        """An array of the version that the page has; of a newer version the page needs the state first."""
        now = self.server.now()
        if query.get("version") != str(now.manifest["version"]):
            self._send(409, "text/plain", b"There is a newer version.")
        elif not query.get("id", "").isdecimal() or int(query["id"]) >= len(now.arrays):
            self._send(404, "text/plain", b"There is no such array.")
        else:
            self._send(200, "application/octet-stream", binary(now, int(query["id"])))

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def command(argv: Sequence[str]) -> int:
    """`inflection-fast watch RUN`. `ValueError` if the folder is none, a file in it is damaged or the port is taken."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="inflection-fast watch",
        description="Serve the page of a run on this machine and follow the run while it trains. Ctrl-C ends it.",
    )
    parser.add_argument("folder", help="the output folder of a run, or of a Monitor")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0: any free one")
    asked = parser.parse_args(argv)
    if not 0 <= asked.port <= 65535:
        raise ValueError(f"port: expected a number from 0 to 65535, got {asked.port}")
    try:
        server = Server(asked.folder, asked.port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "in use" if error.errno == errno.EADDRINUSE else "not allowed for this user"
        raise ValueError(f"port {asked.port} is {why}: choose another one with --port, or --port 0") from error
    with server:
        print(f"{server.url} follows {asked.folder}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
