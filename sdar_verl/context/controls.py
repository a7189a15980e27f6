"""Placebos: texts that look like the context to the tokenizer and carry none of its meaning for this task.

Much of what a privileged teacher does may come from style, from length, or from plain self-imitation; a run with a
placebo of the same length measures that part. Every draw is seeded per task, so a run repeats.

    empty        no text: the teacher reads the student's very prompt
    shuffled     the words of the real context, permuted; line breaks and spaces stay where they are
    wrong        the context of another task, of another type, cut or repeated to the length of the real one
    random_text  words drawn from :data:`~sdar_verl.context.words.WORDS` to the length of the real one
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from sdar_verl.context.base import Passage
from sdar_verl.context.registry import ContextError
from sdar_verl.context.words import WORDS

CONTROLS = ("none", "empty", "shuffled", "wrong", "random_text")
_PIECE = re.compile(r"\S+\s*")

CountTokens = Callable[[str], int]
"""Number of tokens of a text, without special tokens."""


def placebo(
    control: str,
    real: Passage,
    *,
    seed: str,
    count_tokens: CountTokens,
    other: Passage | None = None,
    vocabulary: Sequence[str] = WORDS,
) -> Passage | None:
    """What the teacher sees instead of ``real``.

    Args:
        control: one of :data:`CONTROLS`.
        real: the context; its names and counts stay in the result, so that metrics say what was replaced.
        seed: of the draws; the task's id belongs into it.
        count_tokens: for ``wrong`` and ``random_text``, whose length is at most the real one's, and less by no more
            than the next word would have added.
        other: another task's context, for ``wrong``; without one there is no placebo.
        vocabulary: words for ``random_text``.

    Returns:
        The placebo; None when there is none (``wrong`` without ``other``).

    Raises:
        ContextError: unknown control.
    """
    if control == "none":
        return real
    if control == "empty":
        return replace(real, text="")
    if control == "shuffled":
        return replace(real, text=shuffle_words(real.text, random.Random(seed)))
    if control == "wrong":
        if other is None:
            return None
        return replace(real, text=fit_text(other.text, count_tokens(real.text), count_tokens))
    if control == "random_text":
        tokens = count_tokens(real.text)
        # A word has at least one token, so these are enough.
        drawn = random.Random(seed).choices(vocabulary, k=max(1, tokens))
        return replace(real, text=fit_text(" ".join(drawn), tokens, count_tokens))
    raise ContextError(f"sdar.context.control={control!r}; use one of {', '.join(CONTROLS)}")


def shuffle_words(text: str, rng: random.Random) -> str:
    """``text`` with its words permuted; the white space between them stays."""
    words = re.findall(r"\S+", text)
    rng.shuffle(words)
    order = iter(words)
    return re.sub(r"\S+", lambda _: next(order), text)


def fit_text(text: str, tokens: int, count_tokens: CountTokens) -> str:
    """The longest run of whole words of ``text``, repeated as often as needed, with at most ``tokens`` tokens.

    At least one word is kept.
    """
    pieces = _PIECE.findall(text.strip())
    if not pieces:
        return ""
    pieces[-1] = pieces[-1] + "\n"
    pieces = pieces * (tokens // len(pieces) + 1)
    fits, too_many = 1, min(len(pieces), tokens) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if count_tokens("".join(pieces[:middle]).strip()) <= tokens:
            fits = middle
        else:
            too_many = middle
    return "".join(pieces[:fits]).strip()
