"""What a context asks of the run's writer (``sdar.context.writer``), and how its answer is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json import JSONDecoder
from typing import Any

from sdar_verl.untrusted import shorten

LEFT_OUT = "(earlier ones are left out)"
"""Stands where entries of a list were."""

Piece = str | Sequence[str]

_DECODER = JSONDecoder(strict=False)


class UnreadableAnswer(ValueError):
    """A writer's answer is not what was asked for: the row has no context then, and ``sdar/writer/unparsed`` counts."""


@dataclass(frozen=True, init=False)
class Prompt:
    """One user message for a writer: pieces of text, a blank line between them.

    Args:
        *pieces: a text stands as it is; of a list of texts (the turns of an episode, say), one to a line, the first
            ones are left out where the whole is longer than ``sdar.context.writer.max_prompt_length``.
    """

    pieces: tuple[Piece, ...]

    def __init__(self, *pieces: Piece) -> None:
        object.__setattr__(self, "pieces", tuple(p if isinstance(p, str) else tuple(p) for p in pieces))

    def fit(self, limit: int, count: Callable[[str], int]) -> tuple[str, bool] | None:
        """The text, and whether entries were left out for it.

        Of several lists it is always the longest that gives up its first entry; each keeps its last one.

        Args:
            limit: tokens.
            count: tokens of a text.

        Returns:
            None where it is too long even so.
        """
        lists = {number: list(piece) for number, piece in enumerate(self.pieces) if not isinstance(piece, str)}
        text = self._text(lists)
        excess = count(text) - limit
        if excess <= 0:
            return text, False
        sizes = {number: [count(entry) for entry in entries] for number, entries in lists.items()}
        while excess > 0:
            # Counted entry by entry first, which is near enough; then for good.
            while excess > 0:
                longest = max(sizes, key=lambda number: (len(sizes[number]) > 1, sum(sizes[number])), default=None)
                if longest is None or len(sizes[longest]) < 2:
                    return None
                excess -= sizes[longest].pop(0)
                lists[longest].pop(0)
            text = self._text(lists)
            excess = count(text) - limit
        return text, True

    def _text(self, lists: dict[int, list[str]]) -> str:
        shown = []
        for number, piece in enumerate(self.pieces):
            if isinstance(piece, str):
                shown.append(piece)
                continue
            kept = lists[number]
            shown.append("\n".join([*([LEFT_OUT] if len(kept) < len(piece) else []), *kept]))
        return "\n\n".join(piece for piece in shown if piece)


def read_object(answer: str) -> dict[str, Any]:
    """The first JSON object in an answer, whatever stands around it; line breaks may stand in its texts as they are.

    Raises:
        UnreadableAnswer: there is none.
    """
    for brace in re.finditer("{", answer):
        try:
            found: dict[str, Any] = _DECODER.raw_decode(answer, brace.start())[0]
            return found
        except ValueError:
            continue
        except RecursionError:  # nested deeply, and so from the next brace on
            break
    raise UnreadableAnswer(f"no JSON object: {shorten(answer)}")


def read_text(value: Any, what: str) -> str:
    """``value`` as text with words in it.

    Raises:
        UnreadableAnswer: it is none.
    """
    if not isinstance(value, str) or not value.strip():
        raise UnreadableAnswer(f"{what} is {shorten(value)}, and no text")
    return value.strip()
