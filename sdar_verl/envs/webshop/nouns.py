"""Nouns of a product title, by which WebShop's reward tells whether the right kind of product was bought.

WebShop asks spaCy's English model for words tagged NOUN or PROPN. The model is a download of its own and its version
decides some scores, so the default here is a rule that needs neither; ``spacy`` is the original's way.
docs/fidelity.md says how often the two give another score.
"""

from __future__ import annotations

import functools
import re
from importlib import util
from typing import Literal

from sdar_verl.envs.webshop.reward import Nouns
from sdar_verl.envs.webshop.words import words

NounRule = Literal["rules", "spacy"]
SPACY_MODEL = "en_core_web_sm"

# Words with a letter; inner apostrophes, dots and slashes stay, hyphens between letters part, as spaCy has it.
_WORD = re.compile(r"[^\W_]+(?:['’.&/][^\W_]+)*")
_POSSESSIVE = re.compile(r"['’]s$", re.IGNORECASE)

# In a title nearly every word is a noun or a name, to spaCy as well; what is not belongs to a closed class or is one of
# the adjectives that listings use all the time.
_FUNCTION_WORDS = frozenset(words("function_words"))
_ADJECTIVES = frozenset(words("adjectives"))
_ENDINGS = ("able", "ible", "ful", "less", "ous", "ish", "ally", "proof", "friendly", "resistant")


def nouns_rule(rule: NounRule) -> Nouns:
    """The function that finds a title's nouns, in lower case.

    Raises:
        ImportError: ``spacy`` without spaCy or its English model; the message names the commands.
    """
    if rule == "rules":
        return nouns_by_rules
    if util.find_spec("spacy") is None or util.find_spec(SPACY_MODEL) is None:
        raise ImportError(
            f"webshop option nouns=spacy needs spaCy and its model {SPACY_MODEL}: pip install spacy, then "
            f"python -m spacy download {SPACY_MODEL}; or leave it at nouns=rules"
        )
    return nouns_by_spacy


@functools.lru_cache(maxsize=16384)
def nouns_by_rules(title: str) -> tuple[str, ...]:
    """Words that are no number, no function word and no common adjective."""
    words = (_POSSESSIVE.sub("", word).lower() for word in _WORD.findall(title))
    return tuple(word for word in words if _may_be_noun(word))


@functools.lru_cache(maxsize=16384)
def nouns_by_spacy(title: str) -> tuple[str, ...]:
    """Words that spaCy's model takes for nouns or names."""
    return tuple(token.text.lower() for token in _model()(title) if token.pos_ in ("NOUN", "PROPN"))


@functools.lru_cache(maxsize=1)
def _model():  # type: ignore[no-untyped-def]  # spaCy is optional
    import spacy

    return spacy.load(SPACY_MODEL, exclude=["parser", "ner", "lemmatizer"])


def _may_be_noun(word: str) -> bool:
    if not word[0].isalpha() or word in _FUNCTION_WORDS or word in _ADJECTIVES:
        return False
    return not word.endswith(_ENDINGS)
