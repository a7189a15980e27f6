"""The rows of a teacher pass: the teacher's prompt, followed by the very response ids that the student sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta

from sdar_verl.errors import TeacherError
from sdar_verl.rollout.rows import RowInfo


@dataclass(frozen=True)
class TeacherRows:
    """A step's rows, as the teacher reads them; lists of one tensor per row.

    Attributes:
        prompts: (prompt tokens,), the teacher's; the student's where the teacher has no say.
        responses: (response tokens,).
        response_masks: (response tokens,), 1 where the student sampled.
        has_context: the row has a prompt of the teacher's.
    """

    prompts: list[torch.Tensor]
    responses: list[torch.Tensor]
    response_masks: list[torch.Tensor]
    has_context: list[bool]

    @classmethod
    def read(cls, batch: KVBatchMeta, infos: Sequence[RowInfo | None] | None) -> TeacherRows:
        """Take prompts and responses from the queue.

        Args:
            batch: the step's rows.
            infos: the agent loop's record of each row, None for verl's padding rows. None instead of a list: all rows
                with the student's own prompt.
        """
        names = ["prompts", "responses", "response_mask"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        prompts, responses, masks = (list(data[name].unbind()) for name in names)
        if infos is None:
            return cls(prompts, responses, masks, [True] * len(prompts))
        has_context = [info is not None and info.teacher_prompt_ids is not None for info in infos]
        prompts = [
            torch.as_tensor(info.teacher_prompt_ids, dtype=torch.int64) if seen and info is not None else prompt
            for info, seen, prompt in zip(infos, has_context, prompts, strict=True)
        ]
        return cls(prompts, responses, masks, has_context)

    def inputs(self) -> list[dict[str, torch.Tensor]]:
        """One dict per row with the fields that verl's engines read."""
        return [teacher_row(*row) for row in zip(self.prompts, self.responses, self.response_masks, strict=True)]

    def teacher_masks(self) -> list[torch.Tensor]:
        """The response mask of rows with a context, zeros for the others."""
        return [
            mask if seen else torch.zeros_like(mask)
            for mask, seen in zip(self.response_masks, self.has_context, strict=True)
        ]


def stop_without_contexts(infos: Sequence[RowInfo | None], step: int) -> None:
    """Raise when the teacher sees nothing on any row, and that is not the luck of the step.

    At the first step it is the set-up's fault, but for a late context, which may not exist yet (early in training no
    sibling succeeds). Later, a step may have nothing but tasks without a context, or prompts that are too long: each
    such row has no teacher by an option, and is counted.

    Args:
        infos: one record per row, None for padding rows.
        step: verl's global step, from 1.

    Raises:
        TeacherError: with the reason, as far as the records know it.
    """
    rows = [info for info in infos if info is not None and not info.failed]
    if any(info.teacher_prompt_ids is not None or info.context_missing for info in rows):
        return
    if step > 1 and all(info.truncated or info.context_empty for info in rows):
        return
    if any(info.truncated for info in rows):
        raise TeacherError(
            "not one teacher prompt of this step fits sdar.teacher.max_prompt_length, so the teacher has no say on any "
            "row; raise it, or shorten the context (sdar.skills.max_tokens)"
        )
    raise TeacherError(
        "the teacher sees no context on any row of this step, so it can only repeat the student; "
        "check sdar.skills.bank and sdar.skills.retrieval against the tasks, or set sdar.teacher.source=none"
    )


def teacher_row(prompt: torch.Tensor, response: torch.Tensor, response_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """One row as verl's engines read it: ``prompt`` (prompt tokens,), ``response`` and its mask (response tokens,)."""
    input_ids = torch.cat([prompt, response])
    return {
        "prompts": prompt,
        "responses": response,
        "response_mask": response_mask,
        "loss_mask": response_mask,
        "input_ids": input_ids,
        "position_ids": torch.arange(len(input_ids), device=input_ids.device),
    }


def nested(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of different length as one jagged tensor, the form that verl's fields have."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def response_part(values: torch.Tensor, response_lengths: Sequence[int]) -> torch.Tensor:
    """What an engine computed at the positions that predict the response.

    Args:
        values: nested (rows, sequence tokens, ...): the entry at position i is about token i + 1.
        response_lengths: tokens of each row's response, at the end of its sequence.

    Returns:
        Nested (rows, response tokens, ...).
    """
    return nested([row[-length - 1 : -1] for row, length in zip(values.unbind(), response_lengths, strict=True)])
