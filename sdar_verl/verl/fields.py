"""Names of the fields and metrics that trainer and workers exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

TEACHER_LOG_PROBS = "sdar_teacher_log_probs"
"""Nested (rows, response tokens), nats: log pi_T of the sampled tokens; read only where the mask is 1."""

TEACHER_MASK = "sdar_teacher_mask"
"""Nested (rows, response tokens), int64: 1 where the distillation term reads the teacher."""

TEACHER_ENTROPY = "sdar_teacher_entropy"
"""Nested (rows, response tokens), nats: the teacher's entropy, where its pass computes it."""

TEACHER_PROMPTS = "sdar_teacher_prompts"
"""Nested (rows, prompt tokens), int64: the teacher's prompts, for sources that score inside the update."""

TEACHER_NODE = "sdar_teacher"
"""Key under ``actor_rollout_ref`` by which ``sdar.teacher`` reaches the workers: verl gives them that node alone."""

MODULES_NODE = "sdar_modules"
"""Key under ``actor_rollout_ref`` with the modules that register names (``sdar.modules``), for the workers."""

SUMS_PREFIX = "sdar_total/"
"""Worker metrics under this prefix are sums; the trainer turns them into means."""

NORM_PREFIX = "sdar_norm/"
"""Worker metrics under this prefix are gradient norms in weight space; the trainer turns them into a share."""

TEACHER_PARTITION = "sdar_teacher"
"""TransferQueue partition that holds the teacher's rows during its pass."""

GAP_SHIFT = "sdar_gap_shift"
"""Nested (rows, response tokens), nats: what centring takes off the gap; only with ``sdar.loss.centre``."""

GAP_POOLED = "sdar_gap_pooled"
"""Nested (rows, response tokens), nats: gap of the row's trajectory; only with ``granularity=trajectory``."""

LOSS_SCALE = "sdar_loss_scale"
"""Nested (rows, response tokens): factor on a token's loss; only with another ``divide_by`` than tokens."""

STEP_VALUES = "sdar_step"
"""Key of the batch's ``extra_info`` under which :class:`StepValues` travel to the workers."""


@dataclass(frozen=True)
class StepValues:
    """What the trainer tells the workers at each step.

    Attributes:
        coef: lambda of the auxiliary loss; 0 when the signal enters elsewhere.
        beta: sharpness of the gate.
        ranges: of entropy and gap over the step, for gates that ask for them.
        measure: the step's number when both gradients are to be measured in weight space, else None.
        only: ``rl`` or ``distillation`` during such a measurement: the loss that is differentiated alone.
    """

    coef: float
    beta: float
    ranges: tuple[float, float, float, float] | None = None
    measure: int | None = None
    only: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``extra_info``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepValues:
        """The other way round."""
        return cls(**values)
