"""A writer that follows a script, and answers of one."""

from __future__ import annotations

import json

from sdar_verl.writer.base import Answer


class Scripted:
    """A writer that answers by a function and keeps its batches."""

    during_rollout = False

    def __init__(self, answer, limit=100_000):
        self.answer, self.limit, self.batches = answer, limit, []

    def tokens(self, text):
        return len(text)

    def write(self, texts, step):
        self.batches.append(list(texts))
        answers = [self.answer(text) for text in texts]
        return [a if isinstance(a, Answer) else Answer(a, tokens=2) for a in answers]

    def __str__(self):
        return "the scripted writer"


def hints(*items, **further):
    """The answer that the context ``hint`` asks for, of ``(turn, text)`` pairs."""
    return json.dumps({"hints": [{"turn": turn, "hint": text} for turn, text in items], **further})
