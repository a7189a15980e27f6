"""Rows whose numbers are NaN or infinite: the step stops and names them, or they are left out (``sdar.on_nonfinite``).

The trainer has all rows of a step and knows their names, so it looks here before anything is computed from such a
number. The worker's loss looks again (:func:`sdar_verl.algorithm.masking.clean`); it knows a micro-batch only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict

from sdar_verl.errors import NonFiniteError
from sdar_verl.observe.base import StepRows
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.teacher.rows import nested
from sdar_verl.verl.requests import TEACHER_HIDDEN

STUDENT = {
    "old_log_probs": "the student's log-probs",
    "rollout_log_probs": "the rollout engine's log-probs",
    "ref_log_prob": "the reference's log-probs",
    "values": "the critic's values",
}
"""Fields of a training row that the update reads, and what they are called in a message."""
ADVANTAGES = {"advantages": "the advantages"}

NAMED = 8
"""Rows named in a message."""

_TOKENS = ("prompts", "responses", "input_ids")
_MASKS = ("response_mask", "loss_mask")
_NUMBERS = (
    *("old_log_probs", "rollout_log_probs", "ref_log_prob", "values", "entropy", "rm_scores"),
    *("advantages", "returns", "token_level_rewards", "rollout_is_weights"),
)


def broken_rows(values: torch.Tensor, masks: Sequence[torch.Tensor]) -> list[int]:
    """Rows that hold NaN or infinity at a position that counts.

    Args:
        values: nested (rows, response tokens) or (rows, response tokens, columns).
        masks: per row (response tokens,), not 0 where a value counts.
    """
    found = []
    for number, (row, mask) in enumerate(zip(values.unbind(), masks, strict=True)):
        counts = row[mask.bool()]
        if counts.is_floating_point() and not torch.isfinite(counts).all():
            found.append(number)
    return found


def describe(what: str, broken: Sequence[int], keys: Sequence[str], infos: Sequence[RowInfo | None]) -> str:
    """A sentence that names the rows: verl's key ``{uid}_{session}_{row}``, task and turn."""
    names = []
    for number in broken[:NAMED]:
        info = infos[number]
        names.append(keys[number] + (f" (task {info.task_id}, turn {info.turn + 1})" if info is not None else ""))
    more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return f"{what} hold NaN or infinity in {len(broken)} of {len(keys)} rows: {', '.join(names)}{more}."


def check_student(rows: StepRows, eos_token_id: int, fields: Mapping[str, str] = STUDENT) -> None:
    """Stop the step, or take rows out of it, where a number of the student is not finite.

    A row that is taken out becomes what verl fills batches up with: the same length, end-of-sequence tokens, nothing of
    it counts. Its numbers alone are not enough: the model's own pass over such a row would come out broken again, and
    a gradient of 0 times NaN is NaN.

    Args:
        rows: of the step; ``infos`` and the batch's tags change in place, ``metrics`` gets the count.
        eos_token_id: of the tokenizer.
        fields: to look at -> what a message calls them.

    Raises:
        NonFiniteError: with ``sdar.on_nonfinite=error``, naming the rows; or no row would be left.
    """
    drops = rows.settings.on_nonfinite == "drop"
    stored = rows.get(["response_mask", *fields])
    masks = stored["response_mask"].unbind()
    broken: set[int] = set()
    told = []
    for name, what in fields.items():
        found = broken_rows(stored[name], masks) if name in stored else []
        if found:
            told.append(describe(what, found, rows.batch.keys, rows.infos))
            broken.update(found)
    if drops:
        rows.metrics["sdar/nonfinite_rows"] = rows.metrics.get("sdar/nonfinite_rows", 0) + len(broken)
    if not broken:
        return
    left = [i for i, info in enumerate(rows.infos) if info is not None and not info.failed and i not in broken]
    if not drops or not left:
        raise NonFiniteError(
            f"step {rows.step}: {' '.join(told)} "
            + ("No row is left to train on. " if drops else "")
            + "Weights or activations have overflowed: look at actor/grad_norm of the steps before, lower "
            "actor_rollout_ref.actor.optim.lr, and go on from an earlier checkpoint (trainer.resume_mode=resume_path); "
            "or compute in another precision (model_dtype and mixed_precision of actor_rollout_ref.actor.fsdp_config)."
            + ("" if drops else " sdar.on_nonfinite=drop leaves such rows out of the update and counts them.")
        )
    take_out(rows, sorted(broken), eos_token_id)


def take_out(rows: StepRows, numbers: Sequence[int], eos_token_id: int) -> None:
    """Let nothing of these rows count in the step."""
    stored = rows.get([*_TOKENS, *_MASKS, *_NUMBERS])
    fields = {}
    for name, values in stored.items():
        columns = list(values.unbind())
        for i in numbers:
            columns[i] = torch.full_like(columns[i], eos_token_id if name in _TOKENS else 0)
        fields[name] = nested(columns)
    rows.put(TensorDict(fields, batch_size=len(rows.batch.keys)))
    rows.tag(numbers, is_padding=True)
    for i in numbers:
        rows.infos[i] = None


def check_teacher(
    scored: Mapping[str, torch.Tensor],
    masks: Sequence[torch.Tensor],
    keys: Sequence[str],
    infos: Sequence[RowInfo | None],
    on_nonfinite: str,
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], int]:
    """Stop the step, or take rows out of the distillation term, where a number of the teacher is not finite.

    Args:
        scored: what the teacher pass gave, nested (rows, response tokens[, columns]).
        masks: per row (response tokens,), 1 where the teacher is read.
        keys: verl's row keys.
        infos: one record per row.
        on_nonfinite: ``error`` or ``drop``.

    Returns:
        ``scored`` and ``masks`` with 0 on such rows, and how many they are.

    Raises:
        NonFiniteError: with ``error``; names the rows.
    """
    # Hidden states are gigabytes, and what is not finite there is not finite in the log-probs that come from them.
    broken = {
        name: broken_rows(values, masks)
        for name, values in scored.items()
        if values.is_floating_point() and name != TEACHER_HIDDEN
    }
    numbers = sorted({number for found in broken.values() for number in found})
    if not numbers:
        return dict(scored), list(masks), 0
    if on_nonfinite == "error":
        raise NonFiniteError(
            describe("the teacher's log-probs", numbers, keys, infos) + " Where the student's are fine, it is the "
            "teacher's prompt or its weights: look at sdar/context_tokens/max against the model's length, at "
            "sdar.teacher.source and at the precision of its pass. sdar.on_nonfinite=drop leaves such rows out of the "
            "distillation term and counts them."
        )
    return {name: _zeros_at(values, numbers) for name, values in scored.items()}, _zeros(masks, numbers), len(numbers)


def _zeros(rows: Sequence[torch.Tensor], numbers: Sequence[int]) -> list[torch.Tensor]:
    return [torch.zeros_like(row) if i in numbers else row for i, row in enumerate(rows)]


def _zeros_at(values: torch.Tensor, numbers: Sequence[int]) -> Any:
    # Also where the mask is 0: what is computed from a row's numbers there must not become NaN either.
    return nested(_zeros(values.unbind(), numbers)) if values.is_floating_point() else values
