"""When two phrases mean the same to WebShop: token-set similarity, after an option has been reduced to its colour."""

from __future__ import annotations

import functools
import re

from sdar_verl.envs.webshop.words import words

FUZZY_THRESHOLD = 85

COLOURS = words("colours")
_NOT_WORD = re.compile(r"\W")
_LATIN_1: dict[int, None] = dict.fromkeys(range(128, 256))


def colour_of(option: str) -> str:
    """The colour in an option's value, or the value itself."""
    return next((colour for colour in COLOURS if colour in option), option)


@functools.lru_cache(maxsize=65536)
def alike(first: str, second: str) -> bool:
    """Token-set similarity above 85 of 100, rounded as thefuzz rounds it."""
    from rapidfuzz import fuzz  # here, so that the command line works without the extra

    return round(fuzz.token_set_ratio(_letters(first), _letters(second))) > FUZZY_THRESHOLD


def _letters(text: str) -> str:
    """What thefuzz compares: lower case, no accented letters of Latin-1, spaces for all that is no letter or digit."""
    return _NOT_WORD.sub(" ", text.translate(_LATIN_1)).lower().strip()
