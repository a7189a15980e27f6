"""Whole-word matching between keywords and task descriptions, singular or plural, compounds joined or apart."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import accumulate

# In a name such as AlarmClock, where a word begins.
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")

# Scripts that put no space between words: Thai to Burmese, Khmer, kana, ideographs.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def split_words(text: str) -> list[str]:
    """The words of ``text``, in order: runs of letters and digits, however accents are encoded."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(letter if _of_a_word(letter) else " " for letter in composed).split()


def _of_a_word(letter: str) -> bool:
    return letter.isalnum() or unicodedata.category(letter).startswith("M")  # the vowels of Hindi or Thai


def find_keyword(keyword: str, words: Sequence[str]) -> int | None:
    """Index in ``words`` where ``keyword`` begins; None when it is not there.

    The keyword AlarmClock, alarm clock or alarm-clock is found in each of these forms, alarmclock in one word alone;
    singular and plural are one.
    """
    parts = split_words(_CAPITAL.sub(" ", keyword))
    keyword, ends = "".join(parts), set(accumulate(map(len, parts)))
    wanted = _forms(keyword)
    if _UNSPACED.search(keyword):
        return next((at for at, word in enumerate(words) if keyword.lower() in word.lower()), None)
    for start in range(len(words)):
        compound = ""
        for word in words[start:]:
            compound += word
            if wanted & _forms(compound):
                return start
            if len(compound) not in ends:  # "to get her" is not together
                break
    return None


def _forms(word: str) -> set[str]:
    """``word`` in lower case, and what its singular can be."""
    word = word.lower()
    forms = {word}
    if len(word) > 2 and word.endswith("s") and not word.endswith("ss"):
        forms.add(word[:-1])
    if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        forms.add(word[:-2])
    if word.endswith("ies") and len(word) > 4:
        forms.add(word[:-3] + "y")
    if word.endswith("ves"):
        forms |= {word[:-3] + "f", word[:-3] + "fe"}
    return forms
