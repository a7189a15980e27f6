"""BM25 over a corpus in memory, by the library ``bm25s``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdar_verl.envs.search.passages import Passage, corpus_digest
from sdar_verl.words import search_words

if TYPE_CHECKING:
    import numpy as np

# Lucene's variant with the constants of the BM25 baselines of this field (Anserini).
K1 = 0.9
B = 0.4
_SETTINGS_FILE = "sdar_index.json"

MAX_QUERY_CHARACTERS = 10_000
"""The environment cuts longer queries, since a policy may write anything; the server refuses them."""


@dataclass(frozen=True)
class Hit:
    """A passage that was found, and how well it fits (None: the server does not say)."""

    passage: Passage
    score: float | None = None


class Bm25Retriever:
    """Ranks passages by BM25, in any script (``sdar_verl/words.py``); may be used from several threads.

    Args:
        passages: the corpus; titles are indexed with the texts.
        k1: saturation of term counts.
        b: normalisation by length.
        keep: folder in which the index is kept; read from there when it was made of these passages and settings.

    Raises:
        ValueError: no passages, none with a word to search for, or the folder holds something else.
    """

    def __init__(
        self, passages: Sequence[Passage], k1: float = K1, b: float = B, keep: str | Path | None = None
    ) -> None:
        import bm25s

        if not passages:
            raise ValueError("BM25 needs at least one passage")
        self.passages = list(passages)
        self.digest = corpus_digest(self.passages)
        settings = {"corpus": self.digest, "k1": k1, "b": b, "bm25s": bm25s.__version__}
        settings["words"] = f"icu4py {metadata.version('icu4py')}"
        if keep is not None and _check_kept(Path(keep), settings):
            self._index = _load(Path(keep))
            return
        self._index = bm25s.BM25(method="lucene", k1=k1, b=b)
        words = [search_words(f"{passage.title}\n{passage.text}") for passage in self.passages]
        if not any(words):
            raise ValueError(
                f"none of the {len(words)} passages holds a word to search for, beyond 'the', 'of' and the like"
            )
        self._index.index(words, show_progress=False)
        if keep is not None:
            self._index.save(str(keep), show_progress=False)
            # Last: without it the index is unfinished.
            (Path(keep) / _SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    def search(self, query: str, topk: int) -> list[Hit]:
        """The best passages, best first; equal ones in the corpus's order; none that share no word with the query."""
        known = [word for word in search_words(query) if word in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known)
        return [Hit(self.passages[index], float(scores[index])) for index in _best(scores, topk)]


def _check_kept(folder: Path, settings: Mapping[str, object]) -> bool:
    """Whether ``folder`` holds a finished index of these settings; an error when it holds one of others."""
    try:
        found = json.loads((folder / _SETTINGS_FILE).read_text())
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise ValueError(f"{folder / _SETTINGS_FILE} is damaged ({error}); remove the folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{folder / _SETTINGS_FILE} is damaged (no JSON object); remove the folder")
    if found != dict(settings):
        other = ", ".join(sorted(key for key in settings if found.get(key) != settings[key]))
        raise ValueError(f"{folder} holds an index of another {other}; use another folder, or remove it")
    return True


def _load(folder: Path) -> Any:
    import bm25s

    try:
        index = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
        words, columns = len(index.vocab_dict), len(index.scores["indptr"]) - 1
        if not words - 1 <= columns <= words:  # bm25s adds an empty word
            raise ValueError(f"{words} words for {columns} columns")
    except (ValueError, OSError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise ValueError(
            f"the index in {folder} is damaged ({type(error).__name__}: {error}); remove the folder"
        ) from error
    return index


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
