"""Amazon's metadata server (IMDSv2) on loopback, with a spot notice when the test says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Metadata(ThreadingHTTPServer):
    """``notice`` is given out once it is set; only with a token, as on a machine that asks for version 2."""

    notice: dict[str, str] | None = None
    asked = 0


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        known = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self._answer(200, "the-token") if known else self._answer(400, "")

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.headers.get("X-aws-ec2-metadata-token") != "the-token":
            self._answer(401, "")
        elif self.path == "/latest/meta-data/spot/instance-action" and self.server.notice:
            self._answer(200, json.dumps(self.server.notice))
        else:
            self._answer(404, "")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def metadata_server() -> Iterator[Metadata]:
    """Start it; its address is ``http://127.0.0.1:{server.server_port}``."""
    server = Metadata(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
