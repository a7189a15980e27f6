"""What the rollout server answered for the teacher (``sdar.teacher.placement=rollout_server``), looked at.

The agent loop asked (:mod:`sdar_verl.rollout.server_teacher`); a row carries the answer, or why there is none. On some
rows it carries the server's log-probs of the student's own prompt, too: they say how far engine and trainer are apart,
which is in every gap between such a teacher and the trainer's student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdar_verl.errors import TeacherError
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.table import StepTable

COMPARED = "sdar/server_check/trainer"
"""Metric that is there when a step has compared server and trainer."""


@dataclass(frozen=True)
class ServerCheck:
    """The server's log-probs of the student's own prompts against others of the same tokens, means over tokens, nats.

    Attributes:
        trainer: mean absolute difference to the trainer's log-probs, at the same weights.
        bias: mean of the server's minus the trainer's.
        rollout: mean absolute difference to what the server said when it sampled; None where it did not say.
    """

    trainer: float
    bias: float
    rollout: float | None

    @classmethod
    def of(cls, table: StepTable) -> ServerCheck | None:
        """Over the rows that carry such log-probs; None when none does."""
        found = {
            i: torch.from_numpy(info.student_log_probs)
            for i, info in enumerate(table.infos)
            if info is not None and info.student_log_probs is not None
        }
        if not any(table.response[i].any() for i in found):
            return None

        def differences(name: str) -> torch.Tensor:
            column = table.columns[name].float()
            rows = [(said - column[i, : len(said)])[table.response[i, : len(said)]] for i, said in found.items()]
            return torch.cat(rows).double()

        trainer = differences("old_log_probs")
        sampled = differences("rollout_log_probs") if "rollout_log_probs" in table.columns else None
        return cls(
            trainer=trainer.abs().mean().item(),
            bias=trainer.mean().item(),
            rollout=None if sampled is None else sampled.abs().mean().item(),
        )

    def metrics(self) -> dict[str, float]:
        """As they are logged."""
        metrics = {COMPARED: self.trainer, "sdar/server_check/bias": self.bias}
        return metrics if self.rollout is None else {**metrics, "sdar/server_check/rollout": self.rollout}

    def stop_above(self, tolerance: float) -> None:
        """Raise TeacherError when server and trainer are further apart than ``tolerance``, nats per token."""
        if self.trainer <= tolerance:
            return
        sampled = "" if self.rollout is None else f"; {self.rollout:.3g} from what it gave when it sampled"
        raise TeacherError(
            "the rollout server scores the student's own prompts, and should give the trainer's log-probs, but differs "
            f"by {self.trainer:.3g} nats per token on average ({self.bias:+.3g} with its sign{sampled}); "
            f"sdar.teacher.sanity_tolerance={tolerance}. A teacher asked there would differ from its student "
            "by as much without any context. Common causes: another precision or a quantized rollout, a temperature "
            "that the engine does not apply to prompts, weights that were not synchronised. Use "
            "sdar.teacher.placement=colocated, or raise the tolerance if you accept it"
        )


def stop_unanswered(infos: Sequence[RowInfo | None]) -> None:
    """Raise TeacherError when not one request of a step was answered."""
    asked = [info for info in infos if info is not None and info.teacher_prompt_tokens is not None]
    failed = [info.teacher_failure for info in asked if info.teacher_failure is not None]
    if failed and len(failed) == len(asked):
        raise TeacherError(
            f"the rollout server answered none of the teacher's {len(failed)} requests of this step; the first reason: "
            f"{failed[0]}. See the log of the rollout server, or set sdar.teacher.placement=colocated"
        )


def answer_metrics(infos: Sequence[RowInfo | None]) -> dict[str, float]:
    """How the requests of a step went.

    Args:
        infos: the agent loop's record of each row, None for padding rows.
    """
    asked = [info for info in infos if info is not None and info.teacher_prompt_tokens is not None]
    waits = [info.episode.teacher_wait_s for info in infos if info is not None and info.episode is not None]
    metrics = {}
    if asked:
        lost = sum(info.teacher_failure is not None for info in asked)
        metrics["sdar/teacher_failed_share"] = lost / len(asked)
    if waits:
        metrics["sdar/teacher_wait_s/mean"] = sum(waits) / len(waits)
        metrics["sdar/teacher_wait_s/max"] = max(waits)
    return metrics
