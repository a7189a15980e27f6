"""A retrieval server over any JSONL corpus, speaking Search-R1's and SkyRL's HTTP API at once."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from sdar_verl._version import __version__
from sdar_verl.envs.search.bm25 import Bm25Retriever, Hit

MAX_TOPK = 100


class RetrieveRequest(BaseModel):
    """Body of ``POST /retrieve``: ``queries`` as Search-R1 sends them, or SkyRL's one ``query``."""

    queries: list[str] | None = None
    query: str | None = None
    topk: int | None = Field(None, ge=1, le=MAX_TOPK)
    return_scores: bool = False


def make_app(retriever: Bm25Retriever, topk: int = 3) -> FastAPI:
    """The application: ``POST /retrieve`` and ``GET /health``.

    Args:
        retriever: what answers; it is asked from several threads.
        topk: passages per query when a request does not say.
    """
    app = FastAPI(title="sdar-verl serve-retriever", version=__version__)

    def health() -> dict[str, Any]:
        return {"status": "ok", "passages": len(retriever.passages), "corpus": retriever.digest, "method": "bm25"}

    # Not a coroutine: the framework then runs each request in a thread, and /health answers while searches run.
    def retrieve(request: RetrieveRequest) -> dict[str, Any]:
        if (request.queries is None) == (request.query is None):
            raise HTTPException(422, 'give either "queries", a list of texts, or "query", one text')
        queries = request.queries if request.queries is not None else [request.query or ""]
        found = [retriever.search(query, request.topk or topk) for query in queries]
        return {"result": [[_item(hit, request.return_scores) for hit in hits] for hits in found]}

    app.get("/health")(health)
    app.post("/retrieve")(retrieve)
    return app


def _item(hit: Hit, with_score: bool) -> dict[str, Any]:
    document = hit.passage.as_document()
    return {"document": document, "score": hit.score} if with_score else document
