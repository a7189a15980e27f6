"""Divergences of some tokens' logits, in place: what :func:`sdar_verl.algorithm.head_chunks.map_logits` evaluates.

The values are those of :func:`sdar_verl.algorithm.divergences.full_columns` and ``top_k_columns``; the slopes are their
derivatives in closed form, P the student and Q the teacher, at one position:

    reverse_kl   P_v (log P_v - log Q_v - KL(P||Q))
    forward_kl   P_v - Q_v
    jsd          1/2 P_v (log P_v - log M_v - KL(P||M))
    others       c_v - P_v sum(c), with c_v = d value / d log P_v by autograd
    top-k        with c_i = d value / d log P_i of the k tokens and the tail (small tensors, by autograd):
                 c_i - P_i sum(c) on the k tokens, R_v (c_tail - P_tail sum(c)) on the others, R = P given the tail

Automatic differentiation would hold about twelve tensors of the logits' size at a time; these hold three or four.

Q may be anchored: drawn towards another policy A on the student's prompt, and towards the student itself, detached,

    log Q' = (1 - a - b) log Q + a log A + b sg[log P] - log Z

Then forward_kl has the slope P_v - Q'_v; with b this is SR-OPSD's Renyi step (arXiv:2608.09745), rho = 1 - b. With b
alone reverse_kl has 1 - b times the slope that it has without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from sdar_verl.algorithm.divergences import ABSENT, DIVERGENCES, LN2, Tail, close_support, columns_of

# No two finite logits are that far apart: the divergence is infinite.
INFINITE = 1e12


class Anchor:
    """What the teacher is drawn to.

    Args:
        reference: a.
        student: b; a + b < 1.
        logits: rows -> (chunk, V) float32, A's logits divided by the temperature, or its log-probs of the support,
            (chunk, k + 1); overwritten. None where a is 0.
    """

    def __init__(self, reference: float, student: float, logits: Callable[[slice], torch.Tensor] | None = None):
        self._reference, self._student, self._logits = reference, student, logits

    def draw(self, teacher: torch.Tensor, rows: slice, student: torch.Tensor) -> torch.Tensor:
        """log Q' up to a constant, from Q's logits or log-probs (overwritten) and the student's log-probs, detached."""
        teacher.mul_(1.0 - self._reference - self._student)
        if self._logits is not None:
            teacher.add_(self._logits(rows), alpha=self._reference)
        return teacher.add_(student.detach(), alpha=self._student) if self._student else teacher


class FullDivergence:
    """Over the whole vocabulary.

    Args:
        kind: key of :data:`sdar_verl.algorithm.divergences.DIVERGENCES`.
        teacher_logits: rows -> (chunk, V) float32, divided by the temperature; overwritten.
        anchor: of the teacher; None: the teacher as it is.
        options: of the divergence.
    """

    def __init__(
        self,
        kind: str,
        teacher_logits: Callable[[slice], torch.Tensor],
        anchor: Anchor | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        self._kind, self._teacher, self._anchor = kind, teacher_logits, anchor
        self._function = partial(DIVERGENCES[kind], **(options or {}))

    def columns(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """(chunk, 5), see :data:`sdar_verl.algorithm.divergences.COLUMNS`; overwrites ``logits``."""
        student = _log_softmax(logits)
        teacher = self._target(rows, student)
        p, q = student.exp(), teacher.exp()
        student_entropy, teacher_entropy = -(p * student).sum(-1), -(q * teacher).sum(-1)
        if self._kind == "jsd":
            mixture = torch.logaddexp(student, teacher).sub_(LN2)
            value = (student.sub_(mixture).mul_(p).sum(-1) + teacher.sub_(mixture).mul_(q).sum(-1)) / 2
        elif self._kind == "reverse_kl":
            value = student.sub_(teacher).mul_(p).sum(-1)
        elif self._kind == "forward_kl":
            value = teacher.sub_(student).mul_(q).sum(-1)
        else:
            value = self._function(student, teacher)
        value = value.masked_fill(value > INFINITE, math.inf)
        nothing = torch.zeros_like(value)
        return torch.stack([value, student_entropy, teacher_entropy, nothing, nothing], dim=-1)

    def slope(self, logits: torch.Tensor, rows: slice, upstream: torch.Tensor) -> torch.Tensor:
        """``upstream`` (chunk,) times d divergence / d logits, (chunk, V); overwrites ``logits``."""
        student = _log_softmax(logits)
        teacher = self._target(rows, student)
        if self._kind == "forward_kl":
            return student.exp_().sub_(teacher.exp_()).mul_(upstream.unsqueeze(-1))
        if self._kind not in ("reverse_kl", "jsd"):
            with torch.enable_grad():
                value = self._function(student.requires_grad_(), teacher)
            (inner,) = torch.autograd.grad(value, student, upstream)
            return inner.sub_(student.detach().exp() * inner.sum(-1, keepdim=True))
        if self._kind == "jsd":
            teacher = torch.logaddexp(student, teacher, out=teacher).sub_(LN2)
            upstream = upstream / 2
        inner = teacher.neg_().add_(student)
        p = student.exp_()
        value = (p * inner).sum(-1, keepdim=True)
        return inner.sub_(value).mul_(p).mul_(upstream.unsqueeze(-1))

    def _target(self, rows: slice, student: torch.Tensor) -> torch.Tensor:
        teacher = self._teacher(rows)
        return _log_softmax(teacher if self._anchor is None else self._anchor.draw(teacher, rows, student))


class TargetLogProbs:
    """log Q'(y_t): what an anchored target says of the sampled token, for objectives that look at that token alone.

    Args:
        tokens: (tokens,) int64, the sampled ones.
        teacher_logits, anchor: as of :class:`FullDivergence`.
    """

    def __init__(self, tokens: torch.Tensor, teacher_logits: Callable[[slice], torch.Tensor], anchor: Anchor | None):
        self._tokens, self._teacher, self._anchor = tokens, teacher_logits, anchor

    def columns(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """(chunk, 1), nats, detached; overwrites ``logits``."""
        teacher = self._teacher(rows)
        if self._anchor is not None:
            teacher = self._anchor.draw(teacher, rows, _log_softmax(logits))
        return _log_softmax(teacher).gather(-1, self._tokens[rows].unsqueeze(-1))


class TopKDivergence:
    """Over k tokens, and all others together.

    Args:
        kind: key of :data:`sdar_verl.algorithm.divergences.DIVERGENCES`.
        ids: (tokens, k) int64.
        teacher_log_probs: (tokens, k + 1), see :func:`sdar_verl.algorithm.divergences.on_support`.
        tail: see :func:`sdar_verl.algorithm.divergences.close_support`.
        anchor: of the teacher; None: the teacher as it is. "Any other token" is one event to all of them.
        options: of the divergence.
    """

    def __init__(
        self,
        kind: str,
        ids: torch.Tensor,
        teacher_log_probs: torch.Tensor,
        tail: Tail,
        anchor: Anchor | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        self._kind, self._ids, self._teacher, self._tail = kind, ids, teacher_log_probs, tail
        self._anchor, self._options = anchor, options

    def columns(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """(chunk, 5), see :data:`sdar_verl.algorithm.divergences.COLUMNS`; overwrites ``logits``."""
        student, _ = self._student(logits, rows)
        return self._of_support(student, rows)

    def slope(self, logits: torch.Tensor, rows: slice, upstream: torch.Tensor) -> torch.Tensor:
        """``upstream`` (chunk,) times d divergence / d logits, (chunk, V); overwrites ``logits``."""
        student, log_rest = self._student(logits, rows)
        with torch.enable_grad():
            student.requires_grad_()
            value = self._of_support(student, rows)[:, 0]
        (inner,) = torch.autograd.grad(value, student, upstream)
        inner = inner - student.detach().exp() * inner.sum(-1, keepdim=True)
        rest = logits.sub_(log_rest).exp_().mul_(inner[:, -1:])
        return rest.scatter_(-1, self._ids[rows], inner[:, :-1])

    def _student(self, logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs (chunk, k + 1), and the normaliser of the rest; ``logits`` then hold -infinity at the k tokens."""
        ids = self._ids[rows]
        _shift(logits)
        log_z = logits.logsumexp(-1, keepdim=True)
        chosen = logits.gather(-1, ids) - log_z
        logits.scatter_(-1, ids, -math.inf)
        if ids.shape[-1] == logits.shape[-1]:
            return torch.cat([chosen, torch.full_like(log_z, -math.inf)], dim=-1), torch.zeros_like(log_z)
        log_rest = logits.logsumexp(-1, keepdim=True)
        empty = log_rest < ABSENT / 2
        tail = (log_rest - log_z).masked_fill(empty, -math.inf)
        return torch.cat([chosen, tail], dim=-1), log_rest

    def _of_support(self, student: torch.Tensor, rows: slice) -> torch.Tensor:
        teacher = self._teacher[rows]
        if self._anchor is not None:
            teacher = self._anchor.draw(teacher.clone(), rows, student).log_softmax(-1)
        return columns_of(
            self._kind,
            close_support(student, self._tail),
            close_support(teacher, self._tail),
            student[..., -1].detach(),
            teacher[..., -1],
            self._options,
        )


def _shift(logits: torch.Tensor) -> torch.Tensor:
    """In place: the largest logit becomes 0, so that normalisers are small numbers with all their digits."""
    logits.clamp_(min=ABSENT)
    return logits.sub_(logits.amax(-1, keepdim=True))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """In place; -infinity becomes a number far below any other."""
    _shift(logits)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
