"""The retriever that an environment's options ask for: in this process over a corpus file, or behind HTTP.

A process makes each retriever once and shares it among its environments.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdar_verl.envs.search.bm25 import Bm25Retriever
from sdar_verl.envs.search.client import HttpRetriever
from sdar_verl.envs.search.passages import CorpusError, check_corpus, read_corpus

logger = logging.getLogger(__name__)

MAX_EMBEDDED_BYTES = 200_000_000
"""Every environment process holds the index of an embedded corpus: a larger one should be served once instead."""

Retriever = Bm25Retriever | HttpRetriever


@dataclass(frozen=True)
class RetrieverSettings:
    """Where passages come from; hashable, so that a process makes one retriever for equal settings.

    Attributes:
        where: path of a JSONL corpus, or the addresses of retrieval servers.
        client: keyword arguments of :class:`HttpRetriever`, as pairs.
    """

    where: str | tuple[str, ...]
    client: tuple[tuple[str, object], ...] = ()

    @classmethod
    def of(cls, retriever: str | Sequence[str], **client: object) -> RetrieverSettings:
        """Read the environment's options; None among ``client`` means the default.

        Raises:
            ValueError: an address or a value that cannot be used, or client options beside a corpus file.
        """
        given = tuple(sorted((name, value) for name, value in client.items() if value is not None))
        where = (retriever,) if isinstance(retriever, str) else tuple(retriever)
        if not where or not all(isinstance(place, str) and place.strip() for place in where):
            raise ValueError(f"{retriever!r}: give the path of a JSONL corpus, or the address of a retrieval server")
        if any("://" in place for place in where):
            settings = cls(where, given)
            settings.make_client().close()
            return settings
        if len(where) > 1:
            raise ValueError(
                f"{list(where)}: several places must be addresses (http://...); for files, give one corpus"
            )
        if given:
            raise ValueError(
                f"{given[0][0]}={given[0][1]!r} has no effect with a corpus file ({where[0]}); leave it out, or give a "
                "server's address"
            )
        return cls(where[0])

    @property
    def embedded(self) -> bool:
        """Whether the corpus is searched in this process."""
        return isinstance(self.where, str)

    def make_client(self) -> HttpRetriever:
        """A new client of the servers."""
        assert not isinstance(self.where, str)
        return HttpRetriever(self.where, **dict(self.client))  # type: ignore[arg-type]

    @functools.cached_property
    def longest_s(self) -> float:
        """Seconds that a search may take before it fails; 0 where nothing is waited for."""
        return 0.0 if self.embedded else self.make_client().longest_s

    def check(self, topk: int) -> None:
        """Read the corpus whole (once, :func:`check_corpus`), or ask the servers for ``topk`` passages.

        Raises:
            CorpusError: the file is missing, damaged or too large for every process to hold.
            RetrieverError: a server is away, or answers something else.
        """
        if not isinstance(self.where, str):
            client = self.make_client()
            try:
                client.check(topk)
            finally:
                client.close()
            return
        path = Path(self.where)
        if not path.is_file():
            raise CorpusError(
                f"corpus {self.where} does not exist; make the shipped one with `sdar-verl prepare search --out DIR` "
                "(DIR/corpus.jsonl), or give the address of a retrieval server (sdar.env.options.retriever=http://...)"
            )
        size = path.stat().st_size
        if size > MAX_EMBEDDED_BYTES:
            raise CorpusError(
                f"corpus {self.where} has {size / 1e6:.0f} MB, more than the {MAX_EMBEDDED_BYTES / 1e6:.0f} MB that "
                f"every environment process should hold; serve it (`sdar-verl serve-retriever --corpus {self.where}`) "
                "and set sdar.env.options.retriever=http://..."
            )
        found = check_corpus(path)
        if found.empty:
            logger.warning("corpus %s: %d of its passages have no text and are left out", path, found.empty)


_making = threading.Lock()


def get_retriever(settings: RetrieverSettings) -> Retriever:
    """The process's retriever for ``settings``, made when it is first asked for.

    Raises:
        CorpusError: the corpus cannot be read.
    """
    with _making:  # threads that come while the index is built wait for it instead of building their own
        return _make(settings)


@functools.lru_cache(maxsize=4)
def _make(settings: RetrieverSettings) -> Retriever:
    if isinstance(settings.where, str):
        return Bm25Retriever(read_corpus(settings.where))
    return settings.make_client()
