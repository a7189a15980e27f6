"""Amazon's notice that a spot machine will be taken away, from the machine's own metadata server (IMDSv2)."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Callable

_ADDRESS = "http://169.254.169.254"
_ACTION = "/latest/meta-data/spot/instance-action"
_TIMEOUT_S = 2.0


class Ec2Notice:
    """Asks for the notice; a machine that is none of Amazon's has no such server, and is never asked again.

    Args:
        address: of the metadata server; ``AWS_EC2_METADATA_SERVICE_ENDPOINT`` by default, as in Amazon's own tools.
    """

    def __init__(self, address: str | None = None):
        self._address = (address or os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _ADDRESS).rstrip("/")
        self._open: Callable[..., object] = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self.there = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true" and self._token() is not None

    def asked(self) -> str | None:
        """The notice, such as ``{"action": "terminate", "time": ...}``; None while there is none."""
        if not self.there:
            return None
        token = self._token()
        headers = {} if token is None else {"X-aws-ec2-metadata-token": token}
        return self._get("GET", _ACTION, headers)

    def _token(self) -> str | None:
        return self._get("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})

    def _get(self, method: str, path: str, headers: dict[str, str]) -> str | None:
        request = urllib.request.Request(self._address + path, method=method, headers=headers)
        try:
            with self._open(request, timeout=_TIMEOUT_S) as answer:  # type: ignore[attr-defined]
                return str(answer.read(4096).decode(errors="replace"))
        except (urllib.error.URLError, OSError, ValueError):
            return None
