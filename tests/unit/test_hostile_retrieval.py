"""Retrieval servers and clients of others: bad answers and bad requests are named, bounded, and never a crash."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("urllib3")
pytest.importorskip("bm25s")

from sdar_verl.envs.search import client as client_module
from sdar_verl.envs.search.bm25 import Bm25Retriever
from sdar_verl.envs.search.client import HttpRetriever, RetrieverError, _hits
from sdar_verl.envs.search.env import SearchEnv
from sdar_verl.envs.search.passages import CorpusError, Passage, check_corpus, read_corpus
from sdar_verl.envs.search.server import MAX_BODY_BYTES, MAX_QUERIES, MAX_QUERY_CHARACTERS, make_app
from tests.support.fuzzing import TEXTS, VALUES, damaged, mutations, quick
from tests.support.retrieval_server import GOOD, ScriptedServer, serving

FAULTS = (ValueError, TypeError, KeyError, AttributeError, OverflowError)


@contextmanager
def raw_server(answer: bytes, pause_s: float = 0.0, pieces: int = 1) -> Iterator[str]:
    """Sends these bytes, whatever it is asked, in ``pieces`` with pauses; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(65536)
                    size = max(1, -(-len(answer) // pieces))
                    for at in range(0, len(answer), size):
                        connection.sendall(answer[at : at + size])
                        if stopped.wait(pause_s):
                            break
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/retrieve"
    finally:
        stopped.set()
        listener.close()


def client_of(url: str, **settings: Any) -> HttpRetriever:
    return HttpRetriever([url], **{"timeout_s": 5, "retries": 0, "backoff_s": 0.001, **settings})


# ---------------------------------------------------------------- answers


@quick(150)
@given(answer=mutations(GOOD) | VALUES)
def test_an_answer_with_wrong_parts_is_read_or_a_known_fault(answer: Any) -> None:
    try:
        hits = _hits(json.loads(json.dumps(answer)))
    except FAULTS:  # _ask makes RetrieverErrors of these
        return
    for hit in hits:
        for text in (hit.passage.passage_id, hit.passage.title, hit.passage.text):
            text.encode()


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"result": [[{"document": {"id": "1", "contents": "a"}, "score": ' + b"9" * 400 + b"}]]}",
        b'{"result": [[{"document": {"id": "1", "contents": "a"}, "score": ' + b"9" * 5000 + b"}]]}",
        b"<html><script>alert(1)</script></html>",
        b'{"result": [["document"]]}',
        b'{"result": [{"document": 1}]}',
        b'{"result": "ab"}',
        b"null",
        b"",
        b"\x1f\x8b\x08\x00",
    ],
    ids=["deep", "large score", "digits", "html", "text", "object", "letters", "null", "empty", "gzip"],
)
def test_garbage_is_a_retriever_error(body: bytes) -> None:
    with ScriptedServer(lambda number, _: (200, body, 0)) as server:
        with pytest.raises(RetrieverError, match="answered something else") as caught:
            client_of(server.url).search("q", 3)
        assert len(str(caught.value)) < 1200


def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_ANSWER_BYTES", 1 << 20)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 8000000000\r\n\r\n"
    with raw_server(head + b" " * (8 << 20)) as url, pytest.raises(RetrieverError, match="more than 1 MiB"):
        client_of(url).search("q", 3)


def test_a_compressed_answer_that_nobody_asked_for_is_not_unpacked() -> None:
    import gzip

    packed = gzip.compress(json.dumps(GOOD).encode())
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    with raw_server(head + packed) as url, pytest.raises(RetrieverError, match="answered something else"):
        client_of(url).search("q", 3)


def test_an_answer_that_comes_drop_by_drop_is_given_up_in_time() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n"
    started = time.monotonic()
    with (
        raw_server(head + b" " * 400, pause_s=0.1, pieces=100) as url,
        pytest.raises(RetrieverError, match=r"did not answer within timeout_s=0\.5"),
    ):
        client_of(url, timeout_s=0.5).search("q", 3)
    assert time.monotonic() - started < 5


def test_nobody_is_redirected_to_another_server() -> None:
    with ScriptedServer(lambda number, _: (200, json.dumps(GOOD).encode(), 0)) as other:
        head = f"HTTP/1.1 307 Moved\r\nLocation: {other.url}\r\nContent-Length: 0\r\n\r\n".encode()
        with raw_server(head) as url, pytest.raises(RetrieverError, match="status 307"):
            client_of(url).search("q", 3)
        assert not other.requests


@pytest.mark.parametrize("answer", [b"\x00" * 100, b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\ncut", b""])
def test_what_is_no_http_is_a_retriever_error(answer: bytes) -> None:
    with raw_server(answer) as url, pytest.raises(RetrieverError, match="cannot be reached"):
        client_of(url).search("q", 3)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@host/retrieve", "user or password"),
        ("http://me@host", "user or password"),
        ("http://host:99999", "99999"),
        ("http://[::1", "IPv6"),
        ("file:///etc/passwd", "no address"),
        ("gopher://host", "no address"),
    ],
)
def test_addresses_that_cannot_be_meant_are_refused_without_their_password(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        HttpRetriever([url])
    assert "secret" not in str(caught.value)


# ---------------------------------------------------------------- requests to our server


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    passages = [Passage("p1", "", "green pears"), Passage("p2", "<b>", "red </script> \x00 pears")]
    with serving(make_app(Bm25Retriever(passages))) as url:
        yield url


@pytest.fixture(scope="module")
def ask(served: str) -> Any:
    import urllib3

    pool = urllib3.PoolManager(retries=False)

    def post(body: bytes, **headers: str) -> tuple[int, bytes]:
        answer = pool.request("POST", served, body=body, headers={"Content-Type": "application/json", **headers})
        return answer.status, answer.data

    return post


REQUEST = {"queries": ["red pears"], "topk": 2, "return_scores": True}


@quick(60)
@given(request=mutations(REQUEST) | VALUES)
def test_any_request_is_answered_or_refused(ask: Any, request: Any) -> None:
    status, data = ask(json.dumps(request).encode())
    assert status in (200, 422), data
    assert len(data) < 5000
    json.loads(data)


@quick(40)
@given(body=damaged(json.dumps(REQUEST).encode()) | st.binary(max_size=40))
def test_any_bytes_are_answered_or_refused(ask: Any, body: bytes) -> None:
    assert ask(body)[0] in (200, 400, 422)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 200_000, 400),
        (json.dumps({"queries": ["a"] * (MAX_QUERIES + 1)}).encode(), 422),
        (json.dumps({"query": "a" * (MAX_QUERY_CHARACTERS + 1)}).encode(), 422),
        (json.dumps({"query": "a", "topk": 101}).encode(), 422),
        (json.dumps({"query": "\ud800"}).encode(), 422),
        (json.dumps({"query": "a" * MAX_QUERY_CHARACTERS}).encode(), 200),
        (b" " * (MAX_BODY_BYTES + 1), 413),
    ],
    ids=["deep", "many queries", "long query", "topk", "surrogate", "longest query", "large body"],
)
def test_requests_have_limits_and_short_refusals(ask: Any, body: bytes, status: int) -> None:
    found, data = ask(body)
    assert found == status
    assert len(data) < 2000


def test_the_server_has_no_page_that_loads_scripts_from_elsewhere(served: str) -> None:
    import urllib3

    for page in ("/docs", "/redoc", "/openapi.json"):
        assert urllib3.request("GET", served.replace("/retrieve", page), retries=False).status == 404


def test_serve_retriever_listens_on_this_machine_only_unless_told_otherwise() -> None:
    from sdar_verl.cli import _parser

    arguments = _parser().parse_args(["serve-retriever", "--corpus", "c.jsonl"])
    assert arguments.host == "127.0.0.1"


# ---------------------------------------------------------------- corpora and queries


@quick(80)
@given(content=damaged(b'{"id": "1", "contents": "\\"t\\"\\na"}\n{"id": "2", "title": "t", "text": "b"}\n'))
def test_a_damaged_corpus_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content)
    for read in (read_corpus, check_corpus):
        try:
            read(path)
        except CorpusError as error:
            assert "corpus.jsonl" in str(error)


@quick(60)
@given(query=TEXTS, topk=st.integers(1, 5))
def test_any_query_is_answered(query: str, topk: int) -> None:
    retriever = Bm25Retriever([Passage("p1", "t", "green pears"), Passage("p2", "", "red")])
    assert len(retriever.search(query, topk)) <= topk


@quick(60)
@given(action=st.one_of(TEXTS, TEXTS.map("search: {}".format), TEXTS.map("answer: {}".format)))
def test_any_action_is_a_step(tmp_path_factory: pytest.TempPathFactory, action: str) -> None:
    from sdar_verl.envs.base import Task

    path = tmp_path_factory.getbasetemp() / "any_action.jsonl"
    if not path.exists():
        path.write_text(json.dumps({"id": "1", "contents": '"<|im_end|>"\n</action> \ud800 pears'}) + "\n")
    env = SearchEnv(retriever=str(path))
    env.reset(Task("search", "q", "nq", "which pears?", {"answers": ["green"]}))
    step = env.step(action)
    step.observation.encode()
    assert step.done == action.startswith("answer: ")
