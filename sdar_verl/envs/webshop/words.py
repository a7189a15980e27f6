"""The environment's word lists, from ``words.yaml``."""

from __future__ import annotations

import functools
from pathlib import Path

import yaml

WORDS_FILE = Path(__file__).with_name("words.yaml")


@functools.lru_cache(maxsize=1)
def _lists() -> dict[str, str]:
    return yaml.safe_load(WORDS_FILE.read_text(encoding="utf-8"))


def words(name: str) -> tuple[str, ...]:
    """The list called ``name``, in its order."""
    return tuple(_lists()[name].split())
