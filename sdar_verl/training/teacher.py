"""The privileged teacher: the policy's own weights on the teacher's prompts, without gradient.

No second copy of the weights: the pass runs through the worker group that computes verl's log-probs (``actor``), or its
reference (``reference``), in verl's micro-batches. It answers for the very response ids that were sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.utils.padding import response_from_nested

from sdar_verl.config import TeacherConfig
from sdar_verl.errors import TeacherError
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.training.fields import TEACHER_LOG_PROBS, TEACHER_MASK, TEACHER_PARTITION


def teacher_row(prompt: torch.Tensor, response: torch.Tensor, response_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """One row as verl's engines read it: ``prompt`` (prompt tokens,), ``response`` and its mask (response tokens,)."""
    input_ids = torch.cat([prompt, response])
    return {
        "prompts": prompt,
        "responses": response,
        "response_mask": response_mask,
        "loss_mask": response_mask,
        "input_ids": input_ids,
        "position_ids": torch.arange(len(input_ids)),
    }


class PrivilegedTeacher:
    """Computes ``log pi_T(y_t | s_t+)`` for a batch of rows and writes it beside verl's own fields.

    Args:
        settings: the ``sdar.teacher`` node.
        trainer: verl's trainer; its worker groups and rollout temperature are used.
    """

    def __init__(self, settings: TeacherConfig, trainer: Any):
        self._settings = settings
        self._trainer = trainer

    def score(self, batch: KVBatchMeta, infos: Sequence[RowInfo | None]) -> None:
        """Write ``teacher_log_probs`` and ``teacher_mask`` of every row.

        Args:
            batch: the step's rows.
            infos: the agent loop's record of each row, None for verl's padding rows.

        Raises:
            TeacherError: no row has a context at all.
        """
        has_context = [info is not None and info.teacher_prompt_ids is not None for info in infos]
        if not any(has_context):
            raise TeacherError(
                "the teacher sees no context on any row of this step, so it can only repeat the student; "
                "check sdar.skills.bank and sdar.skills.retrieval against the tasks, or set sdar.teacher.source=none"
            )
        rows = self._student_rows(batch)
        prompts = [
            torch.as_tensor(info.teacher_prompt_ids, dtype=torch.int64) if seen and info is not None else row["prompts"]
            for info, seen, row in zip(infos, has_context, rows, strict=True)
        ]
        log_probs = self._log_probs(batch, rows, prompts)
        masks = [
            row["response_mask"] if seen else torch.zeros_like(row["response_mask"])
            for row, seen in zip(rows, has_context, strict=True)
        ]
        mask = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
        fields = TensorDict({TEACHER_LOG_PROBS: log_probs, TEACHER_MASK: mask}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def check_empty_context(self, batch: KVBatchMeta) -> float:
        """With an empty context the teacher must repeat the student's log-probs: same weights, same path.

        Returns:
            Mean absolute difference over response tokens, nats.

        Raises:
            TeacherError: it exceeds ``sdar.teacher.sanity_tolerance``.
        """
        rows = self._student_rows(batch)
        teacher = self._log_probs(batch, rows, [row["prompts"] for row in rows])
        student = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["old_log_probs"])
        mask = torch.cat([row["response_mask"] for row in rows]).bool()
        gap = (teacher.values() - student["old_log_probs"].values())[mask].abs()
        difference = gap.mean().item()
        if not difference <= self._settings.sanity_tolerance:
            raise TeacherError(
                "the teacher with an empty context should give the student's log-probs, but differs by "
                f"{difference:.3g} nats per token on average (largest {gap.max().item():.3g}); "
                f"sdar.teacher.sanity_tolerance={self._settings.sanity_tolerance}. Its weights, prompt, temperature or "
                "alignment are not the student's: do not trust a run like this. Common causes: dropout in the model, "
                "weights lost by an offload, an attention that lets packed sequences see each other."
            )
        return difference

    def _student_rows(self, batch: KVBatchMeta) -> list[dict[str, torch.Tensor]]:
        names = ["prompts", "responses", "response_mask"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        columns = [data[name].unbind() for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def _log_probs(
        self, batch: KVBatchMeta, rows: list[dict[str, torch.Tensor]], prompts: list[torch.Tensor]
    ) -> torch.Tensor:
        """Log-probs of the rows' responses after ``prompts``; nested (rows, response tokens), nats."""
        inputs = [
            teacher_row(prompt, row["responses"], row["response_mask"])
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        tags = [
            {**tag, "prompt_len": len(prompt), "seq_len": len(prompt) + tag["response_len"]}
            for tag, prompt in zip(batch.tags, prompts, strict=True)
        ]
        keys = list(batch.keys)
        tq.kv_batch_put(keys=keys, partition_id=TEACHER_PARTITION, fields=list_of_dict_to_tensordict(inputs), tags=tags)
        try:
            self._forward(KVBatchMeta(partition_id=TEACHER_PARTITION, keys=keys, tags=tags, extra_info=self._extra()))
            data = tq.kv_batch_get(
                keys=keys, partition_id=TEACHER_PARTITION, select_fields=["log_probs", "response_mask"]
            )
            return response_from_nested(data["log_probs"], data["response_mask"])
        finally:
            tq.kv_clear(keys=keys, partition_id=TEACHER_PARTITION)

    def _extra(self) -> dict[str, Any]:
        return {
            "calculate_entropy": False,
            "compute_loss": False,
            "temperature": self._trainer.config.actor_rollout_ref.rollout.temperature,
        }

    def _forward(self, rows: KVBatchMeta) -> None:
        trainer = self._trainer
        if self._settings.source == "actor":
            output = trainer.actor_rollout_wg.compute_log_prob(rows)
        elif trainer.ref_in_actor:
            rows.extra_info["no_lora_adapter"] = True  # the start weights are the base under the adapter
            output = trainer.actor_rollout_wg.compute_log_prob(rows)
        else:
            output = trainer.ref_policy_wg.compute_ref_log_prob(rows)
        if len(output) != len(rows):
            raise TeacherError(f"the teacher pass returned {len(output)} rows for {len(rows)}: a fault of the engine")
