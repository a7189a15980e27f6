"""Retrieval servers for tests: ours in a thread, and one that misbehaves by a script."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = {"result": [[{"document": {"id": "1", "contents": '"Vessaly"\nA city.'}, "score": 2.5}]]}

Answer = tuple[int, bytes, float]
"""Status, body, seconds to wait first."""


def good(seconds: float = 0.0) -> Answer:
    return 200, json.dumps(GOOD).encode(), seconds


class ScriptedServer:
    """Answers requests by ``script``: called with the number of the request, from 0, and its decoded body."""

    def __init__(self, script: Callable[[int, Any], Answer]) -> None:
        self.requests: list[Any] = []
        self.connections: set[Any] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.connections.add(self.client_address)
                with outer._lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                status, answer, seconds = script(number, body)
                time.sleep(seconds)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._lock = threading.Lock()

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # of 5, a loaded machine drops connections that come at the same time

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/retrieve"

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """An application behind uvicorn on a free port; gives its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/retrieve"
    finally:
        server.should_exit = True
        thread.join()
