"""Names of what trainer, agent loops and workers exchange: columns of the rows, entries of a batch, worker metrics.

A row's columns, in the order in which a step writes them:

    column                    written by                                    read by
    sdar_teacher_prompts      rollout.outputs.teacher_columns, late context verl.worker: SdarTrainingWorker.score
    sdar_prompts_NAME         the same                                      the same, for a further pass
    sdar_looked_at            trainer, with sdar.context.turns_share        worker, teacher's passes
    sdar_support_ids          worker, student's or teacher's pass; or loop  worker, teacher's pass; update (verl.head)
    sdar_teacher_log_probs    worker, teacher's pass, or agent loop         Method.judge (trainer), .terms (worker)
    sdar_teacher_mask         with them                                     Method.terms; the trainer has StepTable.mask
    sdar_log_probs_NAME       worker, further pass                          trainer: StepTable.contrast, teacher.several
    sdar_support_log_probs    worker, teacher's pass, or agent loop         worker, update
    sdar_teacher_hidden       worker, teacher's pass                        worker, update
    sdar_anchor_...           worker, reference's pass                      worker, update
    sdar_contrast             trainer (Method.judge)                        worker (Method.terms)
    sdar_gap_..., _loss_scale the same                                      the same

A row has a teacher where its prompt is not empty. The pass makes the mask of that; the trainer makes its own from the
agent loop's record, and who takes a row out later (:mod:`sdar_verl.finite`) does so in both.

How a pass is asked for has its names in :mod:`sdar_verl.requests`.
"""

from __future__ import annotations

TEACHER_PROMPTS = "sdar_teacher_prompts"
"""Nested (rows, prompt tokens), int32: the teacher's prompt of each row; empty where the teacher has no say."""

TEACHER_LOG_PROBS = "sdar_teacher_log_probs"
"""Nested (rows, response tokens), nats: log pi_T of the sampled tokens; read only where the mask is 1."""

TEACHER_MASK = "sdar_teacher_mask"
"""Nested (rows, response tokens), int64: 1 where the distillation term reads the teacher."""

LOOKED_AT = "sdar_looked_at"
"""Nested (rows, response tokens), int64: 1 on the sampled tokens of rows that the teacher looks at; only with
``sdar.context.turns_share``."""

EMPTY_CONTEXT_LOG_PROBS = "sdar_empty_context_log_probs"
"""Like :data:`TEACHER_LOG_PROBS`, without a context; where a first step compares them with the student's."""

CONTRAST = "sdar_contrast"
"""Nested (rows, response tokens), nats: log-probs that the gap is taken to where there is a bad context."""


def contrast_pass(number: int) -> str:
    """Name of the teacher pass with the ``number``-th text of the bad context, from 0."""
    return f"contrast_{number}"


def teacher_pass(number: int) -> str:
    """Name of the pass of a row's ``number``-th teacher where several are mixed; 0 is the teacher pass itself."""
    return f"teacher_{number}"


def prompts_of(further: str) -> str:
    """Column like :data:`TEACHER_PROMPTS`, of a further pass; empty where a row has no part in it."""
    return f"sdar_prompts_{further}"


def log_probs_of(further: str) -> str:
    """Column like :data:`TEACHER_LOG_PROBS`, of a further pass."""
    return f"sdar_log_probs_{further}"


SUPPORT_IDS = "sdar_support_ids"
"""Nested (rows, response tokens, k), int32: the tokens that a top-k divergence is taken over."""

SUPPORT_LOG_PROBS = "sdar_support_log_probs"
"""Nested (rows, response tokens, k + 1), nats: the teacher's log-probs of those and of all others together."""

TEACHER_HIDDEN = "sdar_teacher_hidden"
"""Nested (rows, response tokens, hidden size): what the teacher's head reads."""

ANCHOR_HIDDEN = "sdar_anchor_hidden"
"""Like :data:`TEACHER_HIDDEN`, of the start policy on the student's prompt (``sdar.loss.anchor.reference``)."""

ANCHOR_LOG_PROBS = "sdar_anchor_log_probs"
"""Like :data:`SUPPORT_LOG_PROBS`, of the start policy on the student's prompt."""

GAP_SHIFT = "sdar_gap_shift"
"""Nested (rows, response tokens), nats: what centring takes off the gap; only with ``sdar.loss.centre``."""

GAP_POOLED = "sdar_gap_pooled"
"""Nested (rows, response tokens), nats: gap of the row's trajectory; only with ``granularity=trajectory``."""

LOSS_SCALE = "sdar_loss_scale"
"""Nested (rows, response tokens): factor on a token's loss; only with another ``divide_by`` than tokens."""

STATISTICS = (GAP_SHIFT, GAP_POOLED, LOSS_SCALE)
"""What a row must know of the others."""

STEP_VALUES = "sdar_step"
"""Entry of ``batch.extra_info``, which verl gives to each micro-batch: :class:`sdar_verl.method.StepValues`, a dict."""

SUMS_PREFIX = "sdar_total/"
"""Worker metrics under this prefix are sums; the trainer turns them into means."""

NORM_PREFIX = "sdar_norm/"
"""Worker metrics under this prefix are gradient norms in weight space; the trainer turns them into a share."""

TEACHER_NODE = "sdar_teacher"
"""Key under ``actor_rollout_ref`` by which ``sdar.teacher`` reaches the workers: verl gives them that node alone."""

MODULES_NODE = "sdar_modules"
"""Key under ``actor_rollout_ref`` with the modules that register names (``sdar.modules``), for the workers."""

TEACHER_MESH = "teacher"
"""verl's name for how a teacher pass is dealt to workers: as the engine is laid out that it runs through."""
