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
from collections.abc import Callable, Sequence
from dataclasses import replace

from sdar_verl.context.base import Passage
from sdar_verl.context.registry import ContextError
from sdar_verl.context.words import WORDS
from sdar_verl.words import pieces

CONTROLS = ("none", "empty", "shuffled", "wrong", "random_text")

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
        The placebo; None when there is none (``wrong`` without ``other``, ``shuffled`` of a text that has one order).

    Raises:
        ContextError: unknown control.
    """
    if control == "none":
        return real
    if control == "empty":
        return replace(real, text="")
    if control == "shuffled":
        mixed = shuffle_words(real.text, random.Random(seed))
        return None if mixed == real.text else replace(real, text=mixed)
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
    """``text`` with its words permuted; the white space between them stays. It differs where another order does."""
    before = list(pieces(text))
    words = [piece.rstrip() for piece in before]
    mixed = list(words)
    while len(set(words)) > 1 and mixed == words:
        rng.shuffle(mixed)
    spaced = (new + old[len(word) :] for new, old, word in zip(mixed, before, words, strict=True))
    return text[: len(text) - len(text.lstrip())] + "".join(spaced)


def fit_text(text: str, tokens: int, count_tokens: CountTokens) -> str:
    """The longest run of whole words of ``text``, repeated as often as needed, with at most ``tokens`` tokens.

    At least one word is kept.
    """
    words = list(pieces(text.strip()))
    if not words:
        return ""
    words[-1] = words[-1] + "\n"
    words = words * (tokens // len(words) + 1)
    fits, too_many = 1, min(len(words), tokens) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if count_tokens("".join(words[:middle]).strip()) <= tokens:
            fits = middle
        else:
            too_many = middle
    return "".join(words[:fits]).strip()
