"""Random but repeatable visits to the shop, and what was seen on them in short, to be compared with the original's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import sha256

STEPS = 14


def next_action(rng: random.Random, step: int, clickables: Sequence[str], has_search: bool, instruction: str) -> str:
    """A search for some words of the instruction, a click on something, now and then one that is not there."""
    words = [word for word in instruction.replace(",", "").split() if word.isalpha()]
    if has_search or rng.random() < 0.05:
        return f"search[{' '.join(rng.sample(words, 3))}]"
    if rng.random() < 0.05:
        return "click[no such thing]"
    offered = [text for text in clickables if text != "buy now" or step >= 8]
    return f"click[{rng.choice(offered)}]"


def seen(text: str, clickables: Sequence[str], has_search: bool) -> str:
    """Hash of a page."""
    return sha256("\n".join([text, *clickables, str(has_search)]).encode()).hexdigest()[:12]
