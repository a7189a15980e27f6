"""What the rollout server answered for the teacher (``sdar.teacher.placement=rollout_server``), as a pass's fields.

The agent loop asked (:mod:`sdar_verl.rollout.server_teacher`); a row carries the answer, or why there is none. On some
rows it carries the server's log-probs of the student's own prompt, too: they say how far engine and trainer are apart,
which is in every gap between such a teacher and the trainer's student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from sdar_verl.errors import TeacherError
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.teacher.rows import TeacherRows, nested

COMPARED = "sdar/server_check/trainer"
"""Metric that is there when a step has compared server and trainer."""

_COLUMNS = ["response_mask", "old_log_probs", "rollout_log_probs"]


def answered_rows(rows: TeacherRows, infos: Sequence[RowInfo | None]) -> TeacherRows:
    """``rows`` without the context of those whose request failed: they take part in RL alone.

    Raises:
        TeacherError: not one request was answered.
    """
    failed = [info is not None and info.teacher_failure is not None for info in infos]
    answered = [seen and not lost for seen, lost in zip(rows.has_context, failed, strict=True)]
    if any(failed) and not any(answered):
        reason = next(info.teacher_failure for info in infos if info is not None and info.teacher_failure)
        raise TeacherError(
            f"the rollout server answered none of the teacher's {sum(failed)} requests of this step; the first reason: "
            f"{reason}. See the log of the rollout server, or set sdar.teacher.placement=colocated"
        )
    return replace(rows, has_context=answered)


def answered_log_probs(rows: TeacherRows, infos: Sequence[RowInfo | None]) -> torch.Tensor:
    """Nested (rows, response tokens) float32, nats; 0 on rows that the mask leaves out.

    Args:
        rows: see :func:`answered_rows`.
        infos: the agent loop's record of each row, None for padding rows.

    Raises:
        TeacherError: a row has no answer, or one of another length.
    """
    values = []
    for info, response, mask in zip(infos, rows.responses, rows.teacher_masks(), strict=True):
        found = info.teacher_log_probs if info is not None else None
        if not mask.any():
            values.append(torch.zeros(len(response)))
            continue
        if found is None or len(found) != len(response):
            raise TeacherError(
                "sdar.teacher.placement=rollout_server: a row has a teacher's prompt, but "
                + (f"{len(found)} log-probs for {len(response)} tokens" if found is not None else "no answer to it")
                + "; its agent loop is not sdar_agent, or changes rows after it"
            )
        values.append(torch.from_numpy(found.astype("float32")))
    return nested(values)


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
    def of(cls, infos: Sequence[RowInfo | None], stored: TensorDict) -> ServerCheck | None:
        """Over the rows that carry such log-probs; None when none does.

        Args:
            infos: the agent loop's record of each row, None for padding rows.
            stored: nested ``response_mask``, ``old_log_probs`` and, if kept, ``rollout_log_probs`` of all rows.
        """
        found = {
            i: info.student_log_probs for i, info in enumerate(infos) if info and info.student_log_probs is not None
        }
        columns = {name: stored[name].unbind() for name in _COLUMNS if name in stored}
        masks = {i: columns["response_mask"][i].bool() for i in found}
        if not any(mask.any() for mask in masks.values()):
            return None
        difference = {
            name: torch.cat([(torch.from_numpy(found[i]) - columns[name][i].float())[masks[i]] for i in found]).double()
            for name in columns
            if name != "response_mask"
        }
        sampled = difference.get("rollout_log_probs")
        return cls(
            trainer=difference["old_log_probs"].abs().mean().item(),
            bias=difference["old_log_probs"].mean().item(),
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


def server_metrics(batch: KVBatchMeta, infos: Sequence[RowInfo | None], tolerance: float | None) -> dict[str, float]:
    """How the requests went, and how far server and trainer are apart.

    Args:
        batch: the step's rows, with the trainer's log-probs.
        infos: the agent loop's record of each row, None for padding rows.
        tolerance: above it the run stops, nats per token; None: it does not.
    """
    stored = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=_COLUMNS)
    check = ServerCheck.of(infos, stored)
    if check is not None and tolerance is not None:
        check.stop_above(tolerance)
    return answer_metrics(infos) | (check.metrics() if check is not None else {})


def answer_metrics(infos: Sequence[RowInfo | None]) -> dict[str, float]:
    """How the requests of a step went.

    Args:
        infos: the agent loop's record of each row, None for padding rows.
    """
    asked = [info for info in infos if info is not None and info.teacher_prompt_ids is not None]
    waits = [info.episode.teacher_wait_s for info in infos if info is not None and info.episode is not None]
    metrics = {}
    if asked:
        lost = sum(info.teacher_failure is not None for info in asked)
        metrics["sdar/teacher_failed_share"] = lost / len(asked)
    if waits:
        metrics["sdar/teacher_wait_s/mean"] = sum(waits) / len(waits)
        metrics["sdar/teacher_wait_s/max"] = max(waits)
    return metrics
