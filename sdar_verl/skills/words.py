"""Whole-word matching between keywords and task descriptions, singular or plural, compounds joined or apart."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A run of letters and digits: what counts as a word of a description or a keyword.
_WORD = re.compile(r"[^\W_]+")

# Scripts that put no space between words: Thai to Burmese, Khmer, kana, ideographs.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def split_words(text: str) -> list[str]:
    """The words of ``text``, in order."""
    return _WORD.findall(text)


def find_keyword(keyword: str, words: Sequence[str]) -> int | None:
    """Index in ``words`` where ``keyword`` begins; None when it is not there.

    AlarmClock, alarmclock, alarm clock and alarm-clock are one keyword; so are singular and plural.
    """
    keyword = "".join(split_words(keyword))
    wanted = _forms(keyword)
    if _UNSPACED.search(keyword):
        return next((at for at, word in enumerate(words) if keyword.lower() in word.lower()), None)
    for start in range(len(words)):
        compound = ""
        for word in words[start:]:
            compound += word
            if wanted & _forms(compound):
                return start
            if len(compound) > len(keyword) + 3:  # longer than any plural of the keyword
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
