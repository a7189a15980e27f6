"""BM25 over a corpus in memory, by the library ``bm25s``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdar_verl.envs.search.passages import Passage, corpus_digest

if TYPE_CHECKING:
    import numpy as np

# Lucene's variant with the constants of the BM25 baselines of this field (Anserini).
K1 = 0.9
B = 0.4


@dataclass(frozen=True)
class Hit:
    """A passage that was found, and how well it fits (None: the server does not say)."""

    passage: Passage
    score: float | None = None


class Bm25Retriever:
    """Ranks passages by BM25; may be used from several threads.

    Args:
        passages: the corpus; titles are indexed with the texts.
        k1: saturation of term counts.
        b: normalisation by length.

    Raises:
        ValueError: no passages.
    """

    def __init__(self, passages: Sequence[Passage], k1: float = K1, b: float = B) -> None:
        import bm25s

        if not passages:
            raise ValueError("BM25 needs at least one passage")
        self.passages = list(passages)
        self.digest = corpus_digest(self.passages)
        self._index = bm25s.BM25(method="lucene", k1=k1, b=b)
        texts = [f"{passage.title}\n{passage.text}" for passage in self.passages]
        self._index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)

    def search(self, query: str, topk: int) -> list[Hit]:
        """The best passages, best first; equal ones in the corpus's order; none that share no word with the query."""
        import bm25s

        [tokens] = bm25s.tokenize(query, stopwords="en", return_ids=False, show_progress=False)
        known = [token for token in tokens if token in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known)
        return [Hit(self.passages[index], float(scores[index])) for index in _best(scores, topk)]


def _best(scores: np.ndarray, topk: int) -> list[int]:
    """Indices of the ``topk`` highest scores above 0, whatever order the ties come in."""
    import numpy as np

    if topk < len(scores):
        least = np.partition(scores, len(scores) - topk)[len(scores) - topk]
        candidates = np.flatnonzero((scores >= least) & (scores > 0))
    else:
        candidates = np.flatnonzero(scores > 0)
    order = np.lexsort((candidates, -scores[candidates]))
    return [int(index) for index in candidates[order][:topk]]
