"""A retrieval server over any JSONL corpus, speaking Search-R1's and SkyRL's HTTP API at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from sdar_verl._version import __version__
from sdar_verl.envs.search.bm25 import MAX_QUERY_CHARACTERS, Bm25Retriever, Hit

MAX_TOPK = 100
MAX_QUERIES = 1024
"""In one request."""
MAX_BODY_BYTES = 16 << 20

Message = MutableMapping[str, Any]
Query = Annotated[str, Field(max_length=MAX_QUERY_CHARACTERS)]


class RetrieveRequest(BaseModel):
    """Body of ``POST /retrieve``: ``queries`` as Search-R1 sends them, or SkyRL's one ``query``."""

    queries: Annotated[list[Query], Field(max_length=MAX_QUERIES)] | None = None
    query: Query | None = None
    topk: int | None = Field(None, ge=1, le=MAX_TOPK)
    return_scores: bool = False


def make_app(retriever: Bm25Retriever, topk: int = 3) -> FastAPI:
    """The application: ``POST /retrieve`` and ``GET /health``.

    Args:
        retriever: what answers; it is asked from several threads.
        topk: passages per query when a request does not say.
    """
    # No /docs: its page would load scripts from another host.
    app = FastAPI(
        title="sdar-verl serve-retriever", version=__version__, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_middleware(BodyLimit)

    # FastAPI's own answer repeats the request, whatever its size, and fails on what JSON cannot carry.
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [{"where": [str(at)[:80] for at in one["loc"]], "fault": one["msg"]} for one in error.errors()[:5]]
        return JSONResponse({"detail": faults}, 422)

    app.add_exception_handler(RequestValidationError, refuse)  # type: ignore[arg-type]  # Starlette's are less exact

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


class BodyLimit:
    """ASGI middleware: a request whose body exceeds :data:`MAX_BODY_BYTES` is answered with 413 and read no further."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """As ASGI says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                refusal = JSONResponse({"detail": f"a request may have {MAX_BODY_BYTES} bytes"}, 413)
                await refusal(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def read() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, read, send)


def _item(hit: Hit, with_score: bool) -> dict[str, Any]:
    document = hit.passage.as_document()
    return {"document": document, "score": hit.score} if with_score else document
