"""Divergences between teacher and student over next-token distributions, instead of the sampled token alone.

P is the student's distribution pi_theta(. | s_t), Q the teacher's pi_T(. | s_t+), both at the rollout temperature:

    forward_kl   KL(Q || P) = sum_v Q_v (log Q_v - log P_v)                 mass-covering
    reverse_kl   KL(P || Q) = sum_v P_v (log P_v - log Q_v)                 mode-seeking
    jsd          1/2 KL(P || M) + 1/2 KL(Q || M),   M = (P + Q) / 2         symmetric, at most ln 2

(arXiv:2605.15155 compares the three: reverse KL > JSD > forward KL.) The gradient goes to the student alone.

The support is the whole vocabulary, or k of its tokens:

- ``bucket``: the k tokens and one event "any other token". Merging events never raises an f-divergence, so the value is
  a lower bound of the full one, and it is the full one at k = V;
- ``renormalise``: both distributions restricted to the k tokens and scaled to sum to 1. What lies outside them has no
  say.

Which k tokens: the student's most likely ones for ``reverse_kl`` and ``jsd``, the teacher's for ``forward_kl``. The
gradient on a logit is P_v (log P_v - log Q_v - KL) for reverse KL and P_v (log P_v - log M_v - KL(P||M)) / 2 for the
JSD: both carry the student's probability as a factor, so the student's top tokens hold all the gradient there is. On
the teacher's support a token that only the student likes would go uncorrected. For forward KL it is P_v - Q_v, and the
tokens that matter are those the teacher expects and the student may lack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

Tail = Literal["bucket", "renormalise"]
LN2 = math.log(2.0)

# Stands for -infinity, so that 0 * log 0 is 0 and not NaN; float32 has room for differences of two of them.
ABSENT = -1e30


def _expectation(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """sum_v exp(weights_v) * values_v over the last dimension, 0 where the weight is 0 (whatever the value)."""
    absent = torch.isneginf(weights)
    return (weights.exp() * values.masked_fill(absent, 0.0)).sum(-1)


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(Q || P); ``student`` and ``teacher`` are log-probs (..., support), the result is (...,), nats."""
    return _expectation(teacher, teacher - student.masked_fill(torch.isneginf(teacher), 0.0))


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(P || Q); ``student`` and ``teacher`` are log-probs (..., support), the result is (...,), nats."""
    student, absent = _present(student)
    return (student.exp().masked_fill(absent, 0.0) * (student - teacher.masked_fill(absent, 0.0))).sum(-1)


def jsd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1/2 KL(P || M) + 1/2 KL(Q || M); ``student`` and ``teacher`` are log-probs (..., support); (...,), nats."""
    neither = torch.isneginf(student) & torch.isneginf(teacher)
    # The mixture of two absent tokens is log(0 + 0), whose gradient is NaN even where it is thrown away.
    mixture = torch.logaddexp(student.masked_fill(neither, 0.0), teacher.masked_fill(neither, 0.0)) - LN2
    to_student = reverse_kl(student, mixture)
    to_teacher = _expectation(teacher, teacher - mixture)
    return 0.5 * (to_student + to_teacher)


def _present(log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    absent = torch.isneginf(log_probs)
    return log_probs.masked_fill(absent, 0.0), absent


Divergence = Callable[..., torch.Tensor]

DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}
"""By name; :func:`sdar_verl.algorithm.objectives.register_divergence` adds to them."""

SUPPORT_OF: dict[str, Literal["student", "teacher"]] = {
    "forward_kl": "teacher",
    "reverse_kl": "student",
    "jsd": "student",
}
"""Whose k most likely tokens a divergence is taken over; the module's docstring says why."""


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """-sum_v p_v log p_v over the last dimension of normalised log-probs; nats."""
    return -_expectation(log_probs, log_probs)


def top_k_ids(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The k most likely tokens, (..., k) int64, most likely first.

    Raises:
        ValueError: k larger than the vocabulary.
    """
    if k > logits.shape[-1]:
        raise ValueError(
            f"sdar.loss.top_k={k} is more than the vocabulary has ({logits.shape[-1]} tokens); "
            "lower it or set sdar.loss.support=full"
        )
    return logits.topk(k, dim=-1).indices


def on_support(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs of some tokens and of all others together.

    The rest is summed from its own logits: one minus the sum of the k probabilities would lose all digits where the k
    tokens hold nearly everything.

    Args:
        logits: (..., V), finite or -infinity.
        ids: (..., k) int64, distinct.

    Returns:
        (..., k + 1) log-probs, the last one of the tail; -infinity there when k = V.
    """
    logits = logits - logits.detach().amax(-1, keepdim=True)  # normalisers are then small, with all their digits
    log_z = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, ids) - log_z
    if ids.shape[-1] == logits.shape[-1]:
        return torch.cat([chosen, torch.full_like(log_z, -math.inf)], dim=-1)
    # Where every other logit is -infinity, logsumexp would have a NaN gradient: it gets finite numbers, thrown away.
    rest = logits.scatter(-1, ids, -math.inf)
    empty = torch.isneginf(rest).all(-1, keepdim=True)
    tail = rest.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True) - log_z
    return torch.cat([chosen, tail.masked_fill(empty, -math.inf)], dim=-1)


def close_support(log_probs: torch.Tensor, tail: Tail) -> torch.Tensor:
    """A distribution that sums to 1 from the (..., k + 1) of :func:`on_support`: with the bucket, or renormalised to
    (..., k)."""
    if tail == "bucket":
        return log_probs
    if tail == "renormalise":
        chosen = log_probs[..., :-1]
        return chosen - chosen.logsumexp(-1, keepdim=True)
    raise ValueError(f"sdar.loss.tail={tail!r}; known: bucket, renormalise")


COLUMNS = ("divergence", "student_entropy", "teacher_entropy", "student_tail", "teacher_tail")
"""What :func:`full_columns` and :func:`top_k_columns` return per token; entropies over the support (bucket included),
tails are probability masses outside the k tokens."""


def full_columns(kind: str, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Divergence and entropies over the whole vocabulary.

    Args:
        kind: key of ``DIVERGENCES``.
        student_logits: (tokens, V), divided by the temperature; the gradient goes here.
        teacher_logits: (tokens, V), likewise; detached.

    Returns:
        (tokens, 5), see ``COLUMNS``; only the first carries a gradient; tails are 0.
    """
    student = student_logits.log_softmax(-1)
    teacher = teacher_logits.detach().log_softmax(-1)
    return columns_of(kind, student, teacher, None, None)


def top_k_columns(
    kind: str, student_logits: torch.Tensor, ids: torch.Tensor, teacher_log_probs: torch.Tensor, tail: Tail
) -> torch.Tensor:
    """Divergence, entropies and tail masses over k tokens.

    Args:
        kind: key of ``DIVERGENCES``.
        student_logits: (tokens, V), divided by the temperature; the gradient goes here.
        ids: (tokens, k) int64.
        teacher_log_probs: (tokens, k + 1), of these tokens and the tail, see :func:`on_support`; detached.
        tail: see :func:`close_support`.

    Returns:
        (tokens, 5), see ``COLUMNS``; only the first carries a gradient.
    """
    student, teacher = on_support(student_logits, ids), teacher_log_probs.detach()
    return columns_of(
        kind, close_support(student, tail), close_support(teacher, tail), student[..., -1].detach(), teacher[..., -1]
    )


def columns_of(
    kind: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_tail: torch.Tensor | None,
    teacher_tail: torch.Tensor | None,
    options: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """The columns of two distributions, log-probs (tokens, support), and of their log-probs outside it (tokens,);
    ``options`` of the divergence."""
    value = DIVERGENCES[kind](student, teacher, **(options or {}))
    with torch.no_grad():
        rest = [entropy(student), entropy(teacher)]
        rest += [torch.zeros_like(value) if mass is None else mass.exp() for mass in (student_tail, teacher_tail)]
    return torch.stack([value, *rest], dim=-1)
