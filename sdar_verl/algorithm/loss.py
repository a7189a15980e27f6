"""The gated self-distillation loss, L_SDAR of arXiv:2605.15155.

    Delta_t = sg[ log pi_T(y_t | s_t+) - log pi_theta(y_t | s_t) ]     gap on the sampled token, nats
    g_t     = sg[ gate(Delta_t; beta) ]                                default (gates.py, gap): sigmoid(beta * Delta_t)
    l_t     = g_t * objective(log pi_theta, log pi_T)                  default (objectives.py, sampled):
                                                                       log pi_T - log pi_theta, minimised
    L_SDAR  = aggregate(l_t over valid response tokens)

s_t is the student's context, s_t+ the same with the privileged context, y_t the sampled token, sg[.] stop-gradient.
The training loss is L_RL + lambda * L_SDAR; lambda belongs to the caller.

:func:`distillation_terms` is the mathematics per token, pure torch; a worker aggregates them with verl's own function
and its own global-batch numbers (:mod:`sdar_verl.verl.loss`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sdar_verl.algorithm.gap import StepStatistics, gate_gap
from sdar_verl.algorithm.gates import gate_weight
from sdar_verl.algorithm.masking import MAX_LOG_RATIO, active_mask, clean
from sdar_verl.algorithm.objectives import loss_per_token
from sdar_verl.algorithm.terms import DistillationTerms


def distillation_terms(
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    gate: str = "gap",
    beta: float = 5.0,
    objective: str = "sampled",
    entropy: torch.Tensor | None = None,
    old_log_probs: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    against: torch.Tensor | None = None,
    target_log_probs: torch.Tensor | None = None,
    importance_clip: float | None = None,
    distill_mask: torch.Tensor | None = None,
    gate_options: Mapping[str, Any] | None = None,
    objective_options: Mapping[str, Any] | None = None,
    granularity: str = "token",
    centre: str = "none",
    clamp: float | None = None,
    statistics: StepStatistics | None = None,
    divergence: torch.Tensor | None = None,
) -> DistillationTerms:
    """Gap, gate and gated objective per token.

    To get L_SDAR, aggregate ``terms.loss`` over the *response mask* (not ``terms.mask``), with the numbers of the
    global batch: the term is then divided by what verl's own terms are divided by, and a row without a teacher
    contributes zero.

    Args:
        student_log_probs: (batch, response_length), log pi_theta(y_t | s_t) in nats, with gradient.
        teacher_log_probs: (batch, response_length), log pi_T(y_t | s_t+) of the same tokens at the same temperature.
        response_mask: (batch, response_length), bool or 0/1; 0 at padding and at tokens the policy did not sample.
        gate: registered name, see :mod:`sdar_verl.algorithm.gates`.
        beta: sharpness of the gate, >= 0.
        objective: registered name, see :mod:`sdar_verl.algorithm.objectives`.
        entropy: (batch, response_length), the student's entropy in nats, for gates that read it.
        old_log_probs: (batch, response_length), log pi_old(y_t | s_t), for objectives and gates that read it.
        advantages: (batch, response_length), of the policy gradient, for gates that read them.
        against: (batch, response_length), log-probs that the gap is taken to, in nats: a teacher's with a bad context
            (``sdar.context.contrast``). None: the student's own.
        target_log_probs: (batch, response_length), of the sampled tokens under what the objective moves the student to
            (``sdar.loss.anchor``), nats. None: the teacher's.
        importance_clip: largest importance weight min(pi_theta / pi_old, importance_clip), detached, that a token's
            loss is multiplied with; None, or without ``old_log_probs``: no weight.
        distill_mask: (batch,) or (batch, response_length), False where there is no teacher log-prob (validation
            rows, failed retrieval, padding rows). None: everywhere there is one.
        gate_options: keyword arguments of the gate beyond its signals.
        objective_options: keyword arguments of the objective beyond its signals.
        granularity, centre, clamp: what becomes of the gap before the gate, :func:`sdar_verl.algorithm.gap.gate_gap`.
        statistics: what these rows must know of the others, :func:`sdar_verl.algorithm.gap.step_statistics`.
        divergence: (batch, response_length), between the two distributions, for an objective that is one; with
            gradient.

    Returns:
        :class:`~sdar_verl.algorithm.terms.DistillationTerms`. Masked positions of the inputs may hold anything, NaN
        included.

    Raises:
        ValueError: unknown gate or objective (the message lists the known), beta negative or not finite, shapes that
            do not fit, NaN or infinity at an unmasked position (names the tensor and the rows), statistics that an
            option needs and that are missing, a gate or an objective that returns another shape.
    """
    if not (math.isfinite(beta) and beta >= 0.0):
        raise ValueError(f"beta is {beta}; it must be finite and >= 0 (the paper uses 5)")
    response, mask = response_mask.bool(), active_mask(response_mask, distill_mask)
    student = clean("student_log_probs", student_log_probs, mask)
    teacher = clean("teacher_log_probs", teacher_log_probs, mask).detach()
    entropy = None if entropy is None else clean("entropy", entropy, mask).detach()
    old = None if old_log_probs is None else clean("old_log_probs", old_log_probs, mask).detach()

    gap = teacher - (student if against is None else clean("against", against, mask)).detach()
    entering = gate_gap(
        gap,
        mask,
        response,
        granularity=granularity,
        centre=centre,
        clamp=clamp,
        statistics=statistics,
    )
    ranges = None if statistics is None else statistics.ranges
    log_ratio = None if old is None else student.detach() - old
    with torch.no_grad():
        weight = gate_weight(
            gate,
            entering,
            beta=beta,
            mask=mask,
            response_mask=response,
            entropy=entropy,
            ranges=ranges,
            advantages=None if advantages is None else clean("advantages", advantages, mask),
            log_ratio=log_ratio,
            options=gate_options,
        )
    target = teacher if target_log_probs is None else clean("target_log_probs", target_log_probs, mask).detach()
    options = objective_options or {}
    per_token = loss_per_token(objective, student, target, options, old_log_probs=old, mask=mask, divergence=divergence)

    weighted = weight * per_token
    if importance_clip is not None and log_ratio is not None:
        weighted = weighted * log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=importance_clip)
    if statistics is not None and statistics.scale is not None:
        weighted = weighted * statistics.scale.to(gap)
    return DistillationTerms(
        loss=weighted,
        gate=weight,
        gap=gap,
        mask=mask,
        response_mask=response,
    )
