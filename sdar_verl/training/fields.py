"""Names of the fields and metrics that trainer and workers exchange."""

from __future__ import annotations

TEACHER_LOG_PROBS = "sdar_teacher_log_probs"
"""Nested (rows, response tokens), nats: log pi_T of the sampled tokens; read only where the mask is 1."""

TEACHER_MASK = "sdar_teacher_mask"
"""Nested (rows, response tokens), int64: 1 where the distillation term reads the teacher."""

SUMS_PREFIX = "sdar_total/"
"""Worker metrics under this prefix are sums; the trainer turns them into means."""

TEACHER_PARTITION = "sdar_teacher"
"""TransferQueue partition that holds the teacher's rows during its pass."""
