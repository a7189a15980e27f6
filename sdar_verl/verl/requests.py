"""What a pass is asked to compute at the language-model head (:mod:`sdar_verl.verl.head` computes it)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

HEAD_REQUEST = "sdar_head_request"
"""Non-tensor entry of a batch: a :class:`HeadRequest` as JSON."""

SUPPORT_IDS = "sdar_support_ids"
"""Nested (rows, response tokens, k), int32: the tokens that a top-k divergence is taken over."""

SUPPORT_LOG_PROBS = "sdar_support_log_probs"
"""Nested (rows, response tokens, k + 1), nats: the teacher's log-probs of those and of all others together."""

TEACHER_HIDDEN = "sdar_teacher_hidden"
"""Nested (rows, response tokens, hidden size): what the teacher's head reads."""

COLUMN_PREFIX = "sdar_distribution_"
"""Model outputs of an update, nested (rows, sequence tokens): this and a name of the divergences' ``COLUMNS``."""

HEAD_FIELDS = (SUPPORT_IDS, SUPPORT_LOG_PROBS, TEACHER_HIDDEN)


@dataclass(frozen=True)
class HeadRequest:
    """One pass's request.

    Attributes:
        what: ``top_k_ids`` writes ``SUPPORT_IDS``; ``top_k`` writes these and ``SUPPORT_LOG_PROBS``; ``on_support``
            reads the ids and writes the log-probs; ``hidden`` writes ``TEACHER_HIDDEN`` and keeps the head's weights;
            ``divergence`` computes the columns of :data:`sdar_verl.algorithm.divergences.COLUMNS`.
        chunk: tokens whose logits exist at a time.
        k: tokens of the support; 0 is the whole vocabulary.
        kind: the divergence.
        tail: what becomes of the rest of the vocabulary.
        teacher: in an update, what a teacher that is scored inside it must give.
    """

    what: Literal["top_k_ids", "top_k", "on_support", "hidden", "divergence"]
    chunk: int
    k: int = 0
    kind: str = ""
    tail: Literal["bucket", "renormalise"] = "bucket"
    teacher: HeadRequest | None = None

    def to_json(self) -> str:
        """The form that travels with a batch."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HeadRequest:
        """Inverse of :meth:`to_json`."""
        fields = json.loads(text)
        teacher = fields.pop("teacher")
        return cls(**fields, teacher=None if teacher is None else cls(**teacher))


@contextmanager
def asked(extra_info: dict[str, Any], request: HeadRequest | None) -> Iterator[None]:
    """Within the context, a batch with this ``extra_info`` carries the request; verl keeps the dict between passes."""
    if request is not None:
        extra_info[HEAD_REQUEST] = request.to_json()
    try:
        yield
    finally:
        extra_info.pop(HEAD_REQUEST, None)
