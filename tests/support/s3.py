"""An S3 server over HTTP on loopback (moto), in a thread of the test; it can hold requests back, or refuse them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

BUCKET = "sdar-runs"


@dataclass
class S3:
    """A server with one bucket.

    Attributes:
        address: ``http://127.0.0.1:PORT``.
        env: environment variables of a process that is to talk to it.
        holds: whether a request, by its method and path, must wait for ``released``.
        refuses: whether it is answered with status 403.
        held: set when a request waits.
        released: set to let all waiting requests go on.
        seen: (method, path) of every request.
    """

    address: str = ""
    env: dict[str, str] = field(default_factory=dict)
    holds: Callable[[str, str], bool] = lambda method, path: False
    refuses: Callable[[str, str], bool] = lambda method, path: False
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    seen: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, application: Any) -> Any:
        """Middleware in front of moto."""

        def serve(environ: dict[str, Any], start: Any) -> Any:
            method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
            self.seen.append((method, path))
            if self.holds(method, path):
                self.held.set()
                self.released.wait(600)
            if self.refuses(method, path):
                body = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
                return Response(body, status=403, mimetype="application/xml")(environ, start)
            return application(environ, start)

        return serve


@contextmanager
def s3_server() -> Iterator[S3]:
    """Start it, with ``BUCKET``; stop it after use."""
    import boto3

    s3 = S3()
    application = s3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    s3.address = f"http://127.0.0.1:{server.server_port}"
    s3.env = {
        "AWS_ENDPOINT_URL": s3.address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    client = boto3.client(
        "s3", endpoint_url=s3.address, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )
    client.create_bucket(Bucket=BUCKET)
    try:
        yield s3
    finally:
        s3.released.set()
        server.shutdown()
        server.server_close()
        _reset()


def _reset() -> None:
    from moto.core.model_instances import reset_model_data

    reset_model_data()
