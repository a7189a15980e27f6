"""An OpenAI-compatible chat endpoint in a thread, which answers by a script."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What a request gets.

    Attributes:
        body: of the answer; text that is no completion stands as it is.
        status: of HTTP.
        seconds: to wait first.
        cut: the connection is closed in the middle of the body.
        headers: beyond the length.
    """

    body: str
    status: int = 200
    seconds: float = 0.0
    cut: bool = False
    headers: dict[str, str] | None = None


def says(text: Any, tokens: int = 7, **reply: Any) -> Reply:
    """A completion that says ``text``."""
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return Reply(json.dumps({"choices": choices, "usage": {"total_tokens": tokens}}), **reply)


@dataclass
class ChatServer:
    """What it was asked, in the order in which requests came.

    Attributes:
        url: what ``sdar.context.writer.url`` is set to.
        requests: decoded bodies.
        headers: of each.
        paths: of each.
        most: requests at a time.
    """

    url: str
    requests: list[dict[str, Any]]
    headers: list[dict[str, str]]
    paths: list[str]
    most: int = 0

    @property
    def prompts(self) -> list[str]:
        """What was said to it."""
        return [request["messages"][0]["content"] for request in self.requests]


@contextlib.contextmanager
def chat_server(script: Callable[[int, str], Reply]) -> Iterator[ChatServer]:
    """Serves until the context ends.

    Args:
        script: number of the request, from 0, and the prompt -> its reply.
    """
    lock, running = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen.requests)
                seen.requests.append(body)
                seen.headers.append(dict(self.headers))
                seen.paths.append(self.path)
                running[0] += 1
                seen.most = max(seen.most, running[0])
            reply = script(number, body["messages"][0]["content"])
            time.sleep(reply.seconds)
            with lock:
                running[0] -= 1
            data = reply.body.encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up
                self.send_response(reply.status)
                for name, value in (reply.headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if reply.cut else data)
            if reply.cut:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # of 5, a loaded machine drops connections that come at the same time
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    seen = ChatServer(f"http://127.0.0.1:{server.server_address[1]}/v1", [], [], [])
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
