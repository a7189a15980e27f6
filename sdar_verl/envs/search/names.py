"""Invented names: no model can have read about them, so that a question about them needs a search."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

_ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "sk",
    "t",
    "tr",
    "v",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ae", "ei", "ou")
_CODAS = ("", "", "l", "m", "n", "nd", "r", "rn", "s", "sk", "th", "x")

_ADJECTIVES = (
    *("Amber", "Ashen", "Borrowed", "Bright", "Broken", "Copper", "Crooked", "Distant", "Drowned", "Empty"),
    *("Faithful", "Folded", "Frozen", "Gentle", "Gilded", "Hidden", "Hollow", "Humble", "Last", "Leaden"),
    *("Little", "Lonely", "Narrow", "Nameless", "Patient", "Quiet", "Restless", "Salted", "Second", "Silent"),
    *("Sleeping", "Slow", "Stolen", "Sunken", "Tangled", "Unwritten", "Velvet", "Wandering", "Winter", "Woven"),
)
_NOUNS = (
    *(
        "Almanac",
        "Anchor",
        "Apprentice",
        "Archive",
        "Astronomer",
        "Beekeeper",
        "Bell",
        "Candle",
        "Cartographer",
        "Clock",
    ),
    *("Compass", "Courier", "Dialogue", "Ferryman", "Garden", "Granary", "Harvest", "Heron", "Index", "Islands"),
    *("Kiln", "Ladder", "Lantern", "Ledger", "Letters", "Loom", "Merchant", "Mirror", "Orchard", "Physician"),
    *("Quarry", "Ropewalk", "Sailors", "Scales", "Shepherd", "Staircase", "Treaty", "Voyage", "Watchman", "Weaver"),
)


class Names:
    """Draws names that have not been drawn before.

    Args:
        rng: where chance comes from.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._taken: set[str] = set()
        self._given = [self._stem(2) for _ in range(60)]

    def word(self) -> str:
        """One invented word, unlike all others."""
        return self._fresh(lambda: self._stem(self._rng.choice((2, 3))))

    def person(self) -> str:
        """Given name and surname; no two people share a surname."""
        return f"{self._rng.choice(self._given)} {self.word()}"

    def title(self) -> str:
        """Title of a book, in plain words."""
        return self._fresh(lambda: f"The {self._rng.choice(_ADJECTIVES)} {self._rng.choice(_NOUNS)}")

    def _fresh(self, draw: Callable[[], str]) -> str:
        for _ in range(10_000):
            name = draw()
            if name not in self._taken:
                self._taken.add(name)
                return name
        raise ValueError("no unused names are left; make a smaller world")

    def _stem(self, syllables: int) -> str:
        parts = [_pick(self._rng, _ONSETS) + _pick(self._rng, _VOWELS) for _ in range(syllables)]
        return ("".join(parts) + _pick(self._rng, _CODAS)).capitalize()


def _pick(rng: random.Random, choices: Sequence[str]) -> str:
    return choices[rng.randrange(len(choices))]
