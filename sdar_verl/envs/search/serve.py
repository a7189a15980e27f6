"""``sdar-verl serve-retriever``."""

from __future__ import annotations

import argparse
import math
import socket
import time
from typing import Any

from sdar_verl.arguments import given_path


def add_parser(commands: Any) -> None:
    """Add ``serve-retriever`` to the sub-commands."""
    parser = commands.add_parser(
        "serve-retriever",
        help="serve a corpus over Search-R1's and SkyRL's retrieval API (BM25)",
        description="Indexes a JSONL corpus ({id, contents} or {id, title, text} a line) in memory and answers POST "
        "/retrieve and GET /health.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--corpus", required=True, type=given_path, metavar="FILE.jsonl", help="one passage a line")
    parser.add_argument(
        "--index",
        type=given_path,
        metavar="DIR",
        help="folder that keeps the index, so that the next start need not make it again (default: none)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--topk", type=int, default=3, help="passages per query when a request does not say")
    parser.add_argument("--k1", type=float, default=0.9, help="BM25's saturation of term counts")
    parser.add_argument("--b", type=float, default=0.4, help="BM25's normalisation by length")


def run(arguments: argparse.Namespace) -> int:
    """Index the corpus and answer until interrupted.

    Raises:
        CorpusError: the corpus is missing or damaged.
        OSError: the address is taken, or not one of this machine.
        ValueError: an option is out of range.
    """
    from sdar_verl.envs.search.bm25 import Bm25Retriever
    from sdar_verl.envs.search.passages import read_corpus
    from sdar_verl.envs.search.server import MAX_TOPK, make_app

    if not 1 <= arguments.topk <= MAX_TOPK:
        raise ValueError(f"--topk {arguments.topk}: choose 1 to {MAX_TOPK}")
    if not (0 <= arguments.k1 < math.inf and 0 <= arguments.b <= 1):
        raise ValueError(f"--k1 {arguments.k1:g} --b {arguments.b:g}: k1 is at least 0, b between 0 and 1")
    _check_address(arguments.host, arguments.port)  # now, and not after a large corpus was indexed
    started = time.perf_counter()
    try:
        retriever = Bm25Retriever(
            read_corpus(arguments.corpus), k1=arguments.k1, b=arguments.b, keep=vars(arguments).get("index")
        )
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed here: pip install "sdar-verl[search]"') from error
    shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(
        f"{len(retriever.passages):,} passages ready in {time.perf_counter() - started:.1f} s "
        f"(corpus {retriever.digest[:16]}); serving http://{shown}:{arguments.port}/retrieve",
        flush=True,
    )
    import uvicorn

    uvicorn.run(make_app(retriever, arguments.topk), host=arguments.host, port=arguments.port, log_level="warning")
    return 0


def _check_address(host: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port}: choose 1 to 65535")
    try:
        [(family, kind, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host {host}: no address of this machine ({error}); choose another") from error
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError(f"--host {host} --port {port}: {error.strerror}; choose another") from error
