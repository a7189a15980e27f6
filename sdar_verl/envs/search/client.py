"""Clients of retrieval servers: Search-R1's HTTP API and SkyRL's variant of it.

Both are ``POST /retrieve``, and answer ``{"result": [[{"document": {"id", "contents"}, "score"}, ...]]}``. Search-R1
sends ``{"queries": [...], "topk", "return_scores"}``, SkyRL (and the released SDAR) ``{"query": "...", ...}``.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdar_verl.envs.search.bm25 import Hit
from sdar_verl.envs.search.passages import passage_from
from sdar_verl.errors import SdarError
from sdar_verl.untrusted import http_address, parse_json

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

MAX_ANSWER_BYTES = 32 << 20
"""A longer answer is no list of passages: three of them have some kilobytes."""

_BODIES: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "search_r1": lambda query: {"queries": [query]},
    "skyrl": lambda query: {"query": query},
}
APIS = tuple(_BODIES)

# Worth another attempt: too many requests, and a server or proxy that is down or starting.
_TRANSIENT = (429, 500, 502, 503, 504)
_LONGEST_PAUSE_S = 10.0

# Asked at the start, in turn, until one of them finds something: a corpus need not hold any one word.
_PROBES = ("test", "who", "city", "year", "中国", "日本")


class RetrieverError(SdarError, ValueError):
    """The retrieval server is away, refuses the request or answers something else; the message says which and why."""


class HttpRetriever:
    """Asks retrieval servers; may be used from several threads, which share one pool of connections.

    Args:
        urls: addresses; without a path, ``/retrieve`` is meant. With several, requests go to them in turn, and a
            further attempt goes to the next one.
        api: ``search_r1`` or ``skyrl``.
        timeout_s: for one attempt.
        retries: further attempts after a time-out, a lost connection or a server's error.
        backoff_s: pause before the second attempt; it doubles with each (up to 10 s) and is shortened at random, so
            that many clients do not come back at once.
        connections: kept open to each server.

    Raises:
        ValueError: an address that is none, or a number out of range.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api: str = "search_r1",
        timeout_s: float = 20.0,
        retries: int = 4,
        backoff_s: float = 0.5,
        connections: int = 128,
    ) -> None:
        import urllib3

        if api not in _BODIES:
            raise ValueError(f"api={api!r}: use one of {', '.join(APIS)}")
        for name, value, kinds, least in (
            ("timeout_s", timeout_s, (int, float), 0.001),
            ("retries", retries, (int,), 0),
            ("backoff_s", backoff_s, (int, float), 0),
        ):
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
                whole = "" if float in kinds else "whole "
                raise ValueError(f"{name}={value!r}: give a {whole}number of at least {least}")
        self.urls = tuple(_address(url) for url in urls)
        if not self.urls:
            raise ValueError("give the address of at least one retrieval server")
        self.api = api
        self._attempts = retries + 1
        self._timeout_s = float(timeout_s)
        self._backoff_s = float(backoff_s)
        self._turns = itertools.count(random.randrange(len(self.urls)))
        self._pool = urllib3.PoolManager(
            num_pools=len(self.urls), maxsize=connections, retries=False, timeout=urllib3.Timeout(total=timeout_s)
        )
        self._failed = threading.Event()

    @property
    def longest_s(self) -> float:
        """Seconds that a search may take, all attempts and pauses together."""
        return self._attempts * self._timeout_s + sum(self._pause(attempt) for attempt in range(1, self._attempts))

    @property
    def failed(self) -> bool:
        """Whether the latest search that ended found no server."""
        return self._failed.is_set()

    def search(self, query: str, topk: int) -> list[Hit]:
        """The server's best passages, best first; one without a text is none.

        Raises:
            RetrieverError: no server answered within all attempts, or one answered what cannot be used.
        """
        try:
            hits = self._search(query, topk)
        except RetrieverError:
            self._failed.set()
            raise
        self._failed.clear()
        return hits

    def check(self, topk: int) -> None:
        """Ask each server for ``topk`` passages until it shows one, whose text must not be empty.

        Raises:
            RetrieverError: naming the first server that does not answer as it should.
        """
        for url in self.urls:
            for query in _PROBES:
                answer = self._ask(url, self._body(query, topk))
                if isinstance(answer, str):
                    raise RetrieverError(f"the retrieval server {url} {answer}; {_START}")
                if answer and all(hit.passage.empty for hit in answer):
                    raise RetrieverError(
                        f"the retrieval server {url} answered {query!r} with {len(answer)} passages without a text, "
                        f"such as {answer[0].passage}: its corpus is empty, or names its texts otherwise than "
                        "`contents`, or `title` and `text`; mend the corpus"
                    )
                if answer:
                    break

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def _search(self, query: str, topk: int) -> list[Hit]:
        body, first, answer = self._body(query, topk), next(self._turns), ""
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(self._pause(attempt) * random.uniform(0.5, 1.0))
            url = self.urls[(first + attempt) % len(self.urls)]
            result = self._ask(url, body)
            if not isinstance(result, str):
                return [hit for hit in result[:topk] if not hit.passage.empty]
            answer = f"{url} {result}"
        raise RetrieverError(
            f"no answer from the retrieval server in {self._attempts} attempts; the last: {answer}; {_START}"
        )

    def _ask(self, url: str, body: Mapping[str, Any]) -> list[Hit] | str:
        """Passages, or what happened that another attempt may mend."""
        import urllib3

        started = time.monotonic()
        try:
            # Neither redirected to another server, nor unpacked: a small compressed answer could fill the memory.
            response = self._pool.request("POST", url, json=body, preload_content=False, decode_content=False)
            data = self._read(response, started)
        except (urllib3.exceptions.ReadTimeoutError, urllib3.exceptions.ConnectTimeoutError) as error:
            if isinstance(error, urllib3.exceptions.NewConnectionError):  # refused; called a time-out by descent only
                return f"cannot be reached ({error})"
            return f"did not answer within timeout_s={self._timeout_s:g}"
        except urllib3.exceptions.HTTPError as error:
            return f"cannot be reached ({type(error).__name__}: {error})"
        except TimeoutError:
            return f"did not answer within timeout_s={self._timeout_s:g}"
        if data is None:
            raise RetrieverError(
                f"the retrieval server {url} answered more than {MAX_ANSWER_BYTES >> 20} MiB, which is no list of "
                "passages; check sdar.env.options.retriever"
            )
        if response.status in _TRANSIENT:
            return f"answered with status {response.status} ({_start_of(data)})"
        if response.status != 200:
            other = next(api for api in APIS if api != self.api)
            raise RetrieverError(
                f"the retrieval server {url} refused the request with status {response.status} "
                f"({_start_of(data)}); check the request (sdar.env.options.topk), the path, and whether it "
                f"speaks api={other} rather than api={self.api} (sdar.env.options.api)"
            )
        try:
            return _hits(parse_json(data))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise RetrieverError(
                f"the retrieval server {url} answered something else than "
                '{"result": [[{"document": {"id", "contents"}, "score"}, ...]]}: '
                f"{_start_of(data)} ({type(error).__name__}: {error}); check sdar.env.options.retriever"
            ) from error

    def _read(self, response: BaseHTTPResponse, started: float) -> bytes | None:
        """The whole answer; None when it is too long. One that comes drop by drop is a TimeoutError."""
        pieces: list[bytes] = []
        size = 0
        while piece := response.read1(1 << 16):
            pieces.append(piece)
            size += len(piece)
            late = time.monotonic() - started > self._timeout_s
            if size > MAX_ANSWER_BYTES or late:
                response.close()  # and the connection with it: the rest is not wanted
                if late:
                    raise TimeoutError
                return None
        response.release_conn()
        return b"".join(pieces)

    def _body(self, query: str, topk: int) -> dict[str, Any]:
        return {**_BODIES[self.api](query), "topk": topk, "return_scores": True}

    def _pause(self, attempt: int) -> float:
        return min(self._backoff_s * 2 ** (attempt - 1), _LONGEST_PAUSE_S)


_START = (
    "start one (`sdar-verl serve-retriever --corpus FILE.jsonl`, or Search-R1's or SkyRL's own), or correct "
    "sdar.env.options.retriever"
)


def _address(url: str) -> str:
    try:
        parts = http_address(url)
    except ValueError as error:
        raise ValueError(
            f"{error}; name a retrieval server, such as http://127.0.0.1:8000/retrieve. One that asks for a password "
            "goes behind a proxy or an SSH tunnel"
        ) from error
    return url if parts.path not in ("", "/") else parts._replace(path="/retrieve").geturl()


def _hits(answer: Any) -> list[Hit]:
    """Passages of the answer to one query; scores may be left out, as with ``return_scores: false``."""
    [items] = answer["result"] or [[]]
    hits = []
    for rank, item in enumerate(items):
        document, score = (item["document"], item.get("score")) if "document" in item else (item, None)
        hits.append(Hit(passage_from(document, default_id=f"rank-{rank}"), None if score is None else float(score)))
    return hits


def _start_of(data: bytes) -> str:
    text = " ".join(data.decode("utf-8", "replace").split())
    return repr(text[:200])
