"""What the passes of a step are asked for beyond verl's own log-probs (:mod:`sdar_verl.verl.head` computes it).

    objective              student pass (old log-probs)   teacher pass              update
    on the sampled token   -                              log_probs                 -
    forward_kl, top_k      -                              top_k                     divergence
    reverse_kl, jsd top_k  top_k_ids                      on_support of those ids   divergence
    any, full              -                              hidden, and the head      divergence

With ``sdar.loss.anchor.reference`` the reference makes a pass over the student's prompts after the teacher's: hidden,
or on_support of the same ids.

Each teacher pass gives the sampled tokens' log-probs, too. A teacher's distribution is kept as k log-probs per token,
or as the hidden state from which its head makes all of them: 4 * (2 * k + 1) bytes per token, or the hidden size in the
model's precision, whatever the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sdar_verl.algorithm.divergences import DIVERGENCES, SUPPORT_OF
from sdar_verl.config.loss import LossConfig
from sdar_verl.fields import SUPPORT_IDS

HEAD_REQUEST = "sdar_head_request"
"""Non-tensor entry of a batch: a :class:`HeadRequest` as JSON."""

TOP_K = 100
CHUNK_TOKENS = 128


@dataclass(frozen=True)
class HeadRequest:
    """One pass's request.

    Attributes:
        what: ``log_probs``: nothing more; ``top_k_ids`` writes ``SUPPORT_IDS``; ``top_k`` writes these and
            ``SUPPORT_LOG_PROBS``; ``on_support`` reads the ids and writes the log-probs; ``hidden`` writes
            ``TEACHER_HIDDEN`` and keeps the head's weights; ``divergence`` computes the columns of
            :data:`sdar_verl.algorithm.divergences.COLUMNS`.
        teacher: a teacher pass: logits are made where the response is, and nowhere else.
        chunk: tokens whose logits exist at a time, beyond verl's own.
        k: tokens of the support; 0 is the whole vocabulary.
        kind: the divergence.
        tail: what becomes of the rest of the vocabulary.
        reference: weight of the start policy in the target of a divergence.
        student: weight of the student itself there.
    """

    what: Literal["log_probs", "top_k_ids", "top_k", "on_support", "hidden", "divergence"] = "log_probs"
    teacher: bool = False
    chunk: int = CHUNK_TOKENS
    k: int = 0
    kind: str = ""
    tail: Literal["bucket", "renormalise"] = "bucket"
    reference: float = 0.0
    student: float = 0.0

    def to_json(self) -> str:
        """The form that travels with a batch."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HeadRequest:
        """Inverse of :meth:`to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class StepRequests:
    """The requests of a step's passes; None: verl's pass as it is.

    Attributes:
        student: with the old log-probs.
        teacher: of the teacher pass.
        update: of the actor's update.
        anchor: of the reference's pass over the student's prompts; None: there is none.
        carry: columns of the rows that the teacher pass reads.
    """

    student: HeadRequest | None = None
    teacher: HeadRequest = HeadRequest(teacher=True)
    update: HeadRequest | None = None
    carry: tuple[str, ...] = ()
    anchor: HeadRequest | None = None

    @classmethod
    def of(cls, loss: LossConfig) -> StepRequests:
        """What the ``sdar.loss`` node asks of the passes of a step."""
        if not reads_distributions(loss):
            return cls()
        chunk = CHUNK_TOKENS if loss.chunk_tokens is None else loss.chunk_tokens
        anchored, drawn = loss.anchor.model_dump(), loss.anchor.reference > 0
        if loss.support != "top_k":
            return cls(
                teacher=HeadRequest("hidden", True, chunk),
                update=HeadRequest("divergence", False, chunk, 0, loss.objective, **anchored),
                anchor=HeadRequest("hidden", True, chunk) if drawn else None,
            )
        k = top_k(loss)
        own = SUPPORT_OF[loss.objective] == "teacher"
        return cls(
            student=None if own else HeadRequest("top_k_ids", False, chunk, k),
            teacher=HeadRequest("top_k" if own else "on_support", True, chunk, k),
            update=HeadRequest("divergence", False, chunk, k, loss.objective, loss.tail or "bucket", **anchored),
            carry=() if own else (SUPPORT_IDS,),
            anchor=HeadRequest("on_support", True, chunk, k) if drawn else None,
        )


def reads_distributions(loss: LossConfig) -> bool:
    """Whether the objective is one over distributions."""
    return loss.objective in DIVERGENCES


def top_k(loss: LossConfig) -> int:
    """``sdar.loss.top_k``, or its default."""
    return TOP_K if loss.top_k is None else loss.top_k


@contextmanager
def asked(extra_info: dict[str, Any], request: HeadRequest | None) -> Iterator[None]:
    """Within the context, a batch with this ``extra_info`` carries the request; verl keeps the dict between passes."""
    if request is not None:
        extra_info[HEAD_REQUEST] = request.to_json()
    try:
        yield
    finally:
        extra_info.pop(HEAD_REQUEST, None)
