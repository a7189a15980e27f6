"""Words of texts in any script, for search and for counting.

Where a script writes no spaces (Chinese, Japanese, Thai, ...), ICU's dictionaries say where a word ends.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

REQUIRED = ("bm25s", "icu4py", "regex")
"""Modules of the extras ``search`` and ``embedding``."""

_SPACED = re.compile(r"\S+\s*")


def search_words(text: str) -> list[str]:
    """Words to index and to search by: lower case, English stop words and single letters left out.

    Of a word in ideographs its single ones are words, too: ICU may cut the same name differently in a query and in a
    sentence.
    """
    return [word for word in _words(text) if word not in _stop_words()]


def _words(text: str) -> list[str]:
    if text.isascii():
        return [run for run in _runs()(text.lower()) if len(run) > 1]
    found: list[str] = []
    for run in _runs()(unicodedata.normalize("NFKC", text).lower()):
        if run.isascii():
            found += [run] if len(run) > 1 else []
            continue
        for word in segments(run):
            if (
                len(word) > 1 or unicodedata.category(word) == "Lo"
            ):  # of an alphabet with cases, one letter says nothing
                found.append(word)
            found += _ideographs()(word) if len(word) > 1 else []
            found += _hangul_pairs(word)
    return found


def _hangul_pairs(word: str) -> list[str]:
    """Korean writes particles onto its nouns: of a longer word its pairs of syllables are words, too."""
    hangul = len(word) > 2 and all("\uac00" <= letter <= "\ud7a3" for letter in word)
    return [word[at : at + 2] for at in range(len(word) - 1)] if hangul else []


def first_words(text: str, limit: int) -> str | None:
    """The first ``limit`` words of ``text``, single spaces between those that are apart; None when it has no more."""
    parts = list(islice(pieces(text), limit + 1))
    return " ".join("".join(parts[:limit]).split()) if len(parts) > limit else None


def pieces(text: str) -> Iterator[str]:
    """The words of ``text``, each with the punctuation and the white space behind it; that before the first is lost."""
    for piece in _SPACED.finditer(text):
        yield from _without_spaces(piece[0])


def _without_spaces(piece: str) -> list[str]:
    """The words of a text without spaces but at its end; one word in most scripts."""
    if piece.isascii() or not any(unicodedata.category(letter) == "Lo" for letter in piece):
        return [piece]
    parts: list[str] = []
    for part in segments(piece):
        if parts and not any(letter.isalnum() for letter in part):
            parts[-1] += part
        else:
            parts.append(part)
    return parts


def segments(text: str) -> list[str]:
    """``text`` cut where ICU sees the boundaries of words, or without ICU into letters; nothing is lost."""
    breaker = _breaker()
    return list(text if breaker is None else breaker(text, "en"))


@functools.cache
def _runs() -> Callable[[str], list[str]]:
    import regex

    # As bm25s and scikit-learn do; with the marks that vowels are written by in Hindi or Thai.
    return regex.compile(r"[\w\p{M}]+").findall


@functools.cache
def _ideographs() -> Callable[[str], list[str]]:
    import regex

    return regex.compile(r"\p{Ideographic}").findall


@functools.cache
def _breaker() -> Any:
    try:
        from icu4py.breakers import WordBreaker
    except ImportError:
        return None
    return WordBreaker


@functools.cache
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return frozenset(STOPWORDS_EN)
