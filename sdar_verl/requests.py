"""What the passes of a step are asked for: the teacher's own, and what verl's give beyond log-probs.

:class:`ScoringPass` is a pass of ours; :class:`HeadRequest` what it, or a pass of verl's, computes at the model's head
(:mod:`sdar_verl.verl.head`).

    objective              student pass (old log-probs)   teacher pass              update
    on the sampled token   -                              log_probs                 -
    the same, anchored     -                              hidden, and the head      target
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sdar_verl.algorithm.divergences import DIVERGENCES, SUPPORT_OF
from sdar_verl.config import SdarConfig
from sdar_verl.config.loss import LossConfig
from sdar_verl.fields import (
    ANCHOR_HIDDEN,
    ANCHOR_LOG_PROBS,
    EMPTY_CONTEXT_LOG_PROBS,
    LOOKED_AT,
    SUPPORT_IDS,
    SUPPORT_LOG_PROBS,
    TEACHER_HIDDEN,
    TEACHER_LOG_PROBS,
    TEACHER_MASK,
    TEACHER_PROMPTS,
    log_probs_of,
    prompts_of,
)

HEAD_REQUEST = "sdar_head_request"
"""Non-tensor entry of a batch: a :class:`HeadRequest` as JSON."""

SCORING_PASS = "sdar_scoring_pass"
"""Non-tensor entry of a batch: a :class:`ScoringPass` as JSON."""

TOP_K = 100
CHUNK_TOKENS = 128


@dataclass(frozen=True)
class HeadRequest:
    """One pass's request.

    Attributes:
        what: ``log_probs``: nothing more; ``top_k_ids`` writes ``SUPPORT_IDS``; ``top_k`` writes these and
            ``SUPPORT_LOG_PROBS``; ``on_support`` reads the ids and writes the log-probs; ``hidden`` writes
            ``TEACHER_HIDDEN`` and keeps the head's weights; ``divergence`` computes the columns of
            :data:`sdar_verl.algorithm.divergences.COLUMNS`; ``target`` what an anchored target says of the sampled
            token.
        teacher: a teacher pass: logits are made where the response is, and nowhere else.
        chunk: tokens whose logits exist at a time, beyond verl's own.
        k: tokens of the support; 0 is the whole vocabulary.
        kind: the divergence.
        tail: what becomes of the rest of the vocabulary.
        reference: weight of the start policy in the target of a divergence, or of the sampled token.
        student: weight of the student itself there.
        options: of the divergence.
    """

    what: Literal["log_probs", "top_k_ids", "top_k", "on_support", "hidden", "divergence", "target"] = "log_probs"
    teacher: bool = False
    chunk: int = CHUNK_TOKENS
    k: int = 0
    kind: str = ""
    tail: Literal["bucket", "renormalise"] = "bucket"
    reference: float = 0.0
    student: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The form that travels with a batch."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HeadRequest:
        """Inverse of :meth:`to_json`."""
        return cls(**json.loads(text))


def _own_names() -> dict[str, str]:
    names = (TEACHER_LOG_PROBS, TEACHER_MASK, SUPPORT_IDS, SUPPORT_LOG_PROBS, TEACHER_HIDDEN)
    return {name: name for name in names}


@dataclass(frozen=True)
class ScoringPass:
    """A pass over the sampled responses behind a prompt of their own, without gradient.

    Attributes:
        request: what is computed at the head.
        prompts: column of the prompts; a row whose prompt is empty is not scored. ``prompts`` are the student's.
        mask: column of the tokens that count; a row without any is not scored.
        reads: further columns that the request reads.
        writes: what the pass gives, by its name as a column of the teacher's -> the column that it is stored in.
        by_reference: verl's reference makes it, whatever the teacher is.
    """

    request: HeadRequest = HeadRequest(teacher=True)
    prompts: str = TEACHER_PROMPTS
    mask: str = "response_mask"
    reads: tuple[str, ...] = ()
    writes: Mapping[str, str] = field(default_factory=_own_names)
    by_reference: bool = False

    @classmethod
    def empty_context(cls) -> ScoringPass:
        """The teacher's, over the student's own prompts: its weights alone are tried."""
        return cls(prompts="prompts", writes={TEACHER_LOG_PROBS: EMPTY_CONTEXT_LOG_PROBS})

    def further(self, name: str) -> ScoringPass:
        """On the same rows, the log-probs of another teacher, or with a text of a bad context."""
        writes = {TEACHER_LOG_PROBS: log_probs_of(name)}
        return ScoringPass(prompts=prompts_of(name), mask=self.mask, writes=writes)

    @property
    def waits(self) -> bool:
        """Whether it needs what the student's pass makes."""
        return bool(self.reads) or self.mask == LOOKED_AT

    @classmethod
    def anchor(cls, request: HeadRequest, reads: tuple[str, ...] = ()) -> ScoringPass:
        """The reference's over the student's prompts, on the rows that have a teacher."""
        writes = {SUPPORT_LOG_PROBS: ANCHOR_LOG_PROBS, TEACHER_HIDDEN: ANCHOR_HIDDEN}
        return cls(request, "prompts", TEACHER_MASK, reads, writes, by_reference=True)

    def to_json(self) -> str:
        """The form that travels with a batch."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ScoringPass:
        """Inverse of :meth:`to_json`."""
        values = json.loads(text)
        return cls(**{**values, "request": HeadRequest(**values["request"]), "reads": tuple(values["reads"])})


@dataclass(frozen=True)
class StepRequests:
    """What the passes of a step are asked for; as it stands, for an objective on the sampled tokens.

    Attributes:
        student: with the old log-probs; None: verl's pass as it is.
        teacher: the teacher's pass.
        update: of the actor's update; None: verl's pass as it is.
        anchor: the reference's pass over the student's prompts; None: there is none.
    """

    student: HeadRequest | None = None
    teacher: ScoringPass = field(default_factory=ScoringPass)
    update: HeadRequest | None = None
    anchor: ScoringPass | None = None

    @classmethod
    def of(cls, loss: LossConfig, mask: str = "response_mask") -> StepRequests:
        """What the ``sdar.loss`` node asks of the passes of a step; ``mask``: of the teacher's."""
        if not reads_distributions(loss):
            return cls(teacher=ScoringPass(mask=mask))
        chunk = CHUNK_TOKENS if loss.chunk_tokens is None else loss.chunk_tokens
        drawn = loss.anchor.reference > 0
        compared: dict[str, Any] = {"reference": loss.anchor.reference, "student": loss.anchor.student}
        if loss.objective in DIVERGENCES:
            compared["options"] = loss.objective_options
        if loss.support != "top_k":
            hidden = HeadRequest("hidden", True, chunk)
            what: Literal["divergence", "target"] = "divergence" if loss.objective in DIVERGENCES else "target"
            return cls(
                teacher=ScoringPass(hidden, mask=mask),
                update=HeadRequest(what, False, chunk, 0, loss.objective, **compared),
                anchor=ScoringPass.anchor(hidden) if drawn else None,
            )
        k, ids = top_k(loss), (SUPPORT_IDS,)
        own = SUPPORT_OF[loss.objective] == "teacher"
        on_support = HeadRequest("on_support", True, chunk, k)
        return cls(
            student=None if own else HeadRequest("top_k_ids", False, chunk, k),
            teacher=ScoringPass(HeadRequest("top_k", True, chunk, k), mask=mask)
            if own
            else ScoringPass(on_support, mask=mask, reads=ids),
            update=HeadRequest("divergence", False, chunk, k, loss.objective, loss.tail or "bucket", **compared),
            anchor=ScoringPass.anchor(on_support, ids) if drawn else None,
        )

    def update_with(self, student: float) -> HeadRequest | None:
        """The update's, at a step whose target has this weight of the student."""
        return None if self.update is None else replace(self.update, student=student)


def reads_distributions(loss: LossConfig) -> bool:
    """Whether the update compares distributions: the objective is one over them, or its target is anchored."""
    return loss.objective in DIVERGENCES or (anchored(loss) and loss.coef > 0)


def anchored(loss: LossConfig) -> bool:
    """Whether the student is moved to another target than the teacher."""
    return loss.anchor.reference > 0 or loss.anchor.student > 0


def distribution_option(loss: LossConfig) -> str:
    """The option by which :func:`reads_distributions`, for messages."""
    return f"sdar.loss.objective={loss.objective}" + ("" if loss.objective in DIVERGENCES else " with sdar.loss.anchor")


def top_k(loss: LossConfig) -> int:
    """``sdar.loss.top_k``, or its default."""
    return TOP_K if loss.top_k is None else loss.top_k


def server_support(sdar: SdarConfig) -> int:
    """How many of the teacher's likeliest tokens the rollout server is asked for; 0 where it is not, or for none."""
    here = sdar.teacher.placement == "rollout_server" and reads_distributions(sdar.loss)
    return top_k(sdar.loss) if here else 0


@contextmanager
def requested(extra_info: dict[str, Any], request: HeadRequest | None) -> Iterator[None]:
    """Within the context, a batch with this ``extra_info`` carries the request; verl keeps the dict between passes."""
    if request is not None:
        extra_info[HEAD_REQUEST] = request.to_json()
    try:
        yield
    finally:
        extra_info.pop(HEAD_REQUEST, None)
