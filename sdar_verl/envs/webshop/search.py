"""The shop's search: BM25 over the products, analysed about as Lucene's English analyser does.

`bm25s`_ computes all scores of a term when the index is built, so that a query is a sum of sparse columns; its index
lies on disk as arrays that all processes of a node map into memory together. k1 = .9 and b = .4 are the defaults of
Pyserini, which WebShop uses.

.. _bm25s: https://github.com/xhluca/bm25s
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sdar_verl.envs.webshop.words import words

K1, B = 0.9, 0.4
MAX_RESULTS = 50

STOP_WORDS = frozenset(words("stop_words"))
# Unicode word breaks, in short: a dot, colon or apostrophe stays between letters, a dot or comma between digits.
_WORD = re.compile(r"\w+(?:(?:(?<=[^\W\d_])[.:'’·](?=[^\W\d_])|(?<=\d)[.,;'’](?=\d))\w+)*")
_POSSESSIVE = re.compile(r"['’][sS]$")


@functools.lru_cache(maxsize=1)
def _stemmer() -> Any:
    import Stemmer

    return Stemmer.Stemmer("porter")


def analyse(text: str) -> list[str]:
    """Terms of a document or query: words, lower case, no stop words, Porter stems."""
    words = (_POSSESSIVE.sub("", word).lower() for word in _WORD.findall(text))
    return list(_stemmer().stemWords([word for word in words if word not in STOP_WORDS]))


class SearchIndex:
    """A read-only index on disk."""

    def __init__(self, bm25: Any) -> None:
        self._bm25 = bm25
        self._known: dict[str, int] = bm25.vocab_dict

    @staticmethod
    def build(texts: Iterable[str], folder: str | Path) -> None:
        """Index ``texts`` and write the index to ``folder``."""
        import bm25s

        vocabulary: dict[str, int] = {}
        # Numbers instead of words: the full catalogue has some hundred million of them.
        documents = [
            np.fromiter((vocabulary.setdefault(term, len(vocabulary)) for term in analyse(text)), dtype=np.int32)
            for text in texts
        ]
        bm25 = bm25s.BM25(method="lucene", k1=K1, b=B)
        bm25.index((documents, vocabulary), show_progress=False, create_empty_token=False)
        bm25.save(str(folder), show_progress=False)

    @classmethod
    def open(cls, folder: str | Path) -> SearchIndex:
        """Map the index in ``folder`` into memory.

        Raises:
            FileNotFoundError: it is not there.
        """
        import bm25s

        return cls(bm25s.BM25.load(str(folder), mmap=True, load_corpus=False))

    def search(self, query: str, limit: int = MAX_RESULTS) -> list[int]:
        """Numbers of the best documents, best first, those of equal score in their order; none that lacks all terms."""
        terms = [self._known[term] for term in analyse(query) if term in self._known]
        if not terms:
            return []
        scores = self._bm25.get_scores_from_ids(terms)
        found = np.flatnonzero(scores > 0)
        if len(found) > limit:
            worst = np.partition(scores[found], len(found) - limit)[len(found) - limit]
            found = found[scores[found] >= worst]
        order = np.argsort(-scores[found], kind="stable")
        return found[order][:limit].tolist()
