"""Rows whose numbers are NaN or infinite: the step stops and names them, or they are left out (``sdar.on_nonfinite``).

The trainer has all rows of a step and knows their names, so it looks here before anything is computed from such a
number. The worker's loss looks again (:func:`sdar_verl.algorithm.masking.clean`); it knows a micro-batch only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sdar_verl.algorithm.masking import ROWS_NAMED
from sdar_verl.errors import NonFiniteError
from sdar_verl.fields import TEACHER_LOG_PROBS, TEACHER_MASK, log_probs_of
from sdar_verl.table import StepTable, nested

UPDATE_COLUMNS = {
    "old_log_probs": "the student's log-probs",
    "rollout_log_probs": "the rollout engine's log-probs",
    "ref_log_prob": "the reference's log-probs",
    "values": "the critic's values",
}
"""Columns that the update reads, and what they are called in a message."""
ADVANTAGE_COLUMNS = {"advantages": "the advantages"}

_TOKENS = ("prompts", "responses", "input_ids")
_MASKS = ("response_mask", "loss_mask")
_NUMBERS = (
    *("old_log_probs", "rollout_log_probs", "ref_log_prob", "values", "entropy", "rm_scores"),
    *("advantages", "returns", "token_level_rewards", "rollout_is_weights"),
)


def broken_rows(values: torch.Tensor, mask: torch.Tensor) -> list[int]:
    """Rows that hold NaN or infinity where ``mask`` (rows, response_length) is on."""
    return (mask & ~torch.isfinite(values)).any(dim=-1).nonzero().flatten().tolist()


def describe(what: str, broken: Sequence[int], table: StepTable) -> str:
    """A sentence that names the rows: verl's key, task and turn."""
    names = []
    for number in broken[:ROWS_NAMED]:
        info = table.infos[number]
        place = f" (task {info.task_id}, turn {info.turn + 1})" if info is not None else ""
        names.append(table.rows.keys[number] + place)
    more = f" and {len(broken) - ROWS_NAMED} more" if len(broken) > ROWS_NAMED else ""
    return f"{what} hold NaN or infinity in {len(broken)} of {len(table.infos)} rows: {', '.join(names)}{more}."


def check_rows(table: StepTable, columns: Mapping[str, str], on_nonfinite: str, eos_token_id: int) -> dict[str, float]:
    """Stop the step, or take rows out of it, where a number of the student is not finite.

    A row that is taken out becomes what verl fills batches up with: the same length, end-of-sequence tokens, nothing of
    it counts. Its numbers alone are not enough: the model's own pass over such a row would come out broken again, and
    a gradient of 0 times NaN is NaN.

    Args:
        table: of the update; changes in place, and so does what is stored of it.
        columns: to look at -> what a message calls them.
        on_nonfinite: ``error`` or ``drop``.
        eos_token_id: of the tokenizer.

    Returns:
        With ``drop``: how many rows, all in all, as a metric.

    Raises:
        NonFiniteError: with ``error``, naming the rows; or no row would be left.
    """
    drops = on_nonfinite == "drop"
    broken: set[int] = set()
    told = []
    for name, what in columns.items():
        values = table.columns.get(name)
        found = broken_rows(values, table.response) if values is not None else []
        if found:
            told.append(describe(what, found, table))
            broken.update(found)
    if broken:
        left = [i for i, info in enumerate(table.infos) if info is not None and not info.failed and i not in broken]
        if not drops or not left:
            raise NonFiniteError(
                f"step {table.step}: {' '.join(told)} "
                + ("No row is left to train on. " if drops else "")
                + "Weights or activations have overflowed: look at actor/grad_norm of the steps before, lower "
                "actor_rollout_ref.actor.optim.lr, and go on from an earlier checkpoint "
                "(trainer.resume_mode=resume_path); or compute in another precision (model_dtype and mixed_precision "
                "of actor_rollout_ref.actor.fsdp_config)."
                + ("" if drops else " sdar.on_nonfinite=drop leaves such rows out of the update and counts them.")
            )
        _take_out(table, sorted(broken), eos_token_id)
    return {"sdar/nonfinite_rows": table.taken_out} if drops else {}


def _take_out(table: StepTable, numbers: Sequence[int], eos_token_id: int) -> None:
    stored = table.rows.read([*_TOKENS, *_MASKS, *_NUMBERS, TEACHER_MASK])
    changed = {}
    for name, values in stored.items():
        rows = list(values.unbind())
        for i in numbers:
            rows[i] = torch.full_like(rows[i], eos_token_id if name in _TOKENS else 0)
        changed[name] = nested(rows)
    table.rows.write(changed)
    table.rows.tag(numbers, is_padding=True)
    table.take_out(numbers)


def check_teacher(table: StepTable, on_nonfinite: str) -> dict[str, float]:
    """Stop the step, or take rows out of the distillation term, where a number of the teacher is not finite.

    Workers mark a row that holds such a number anywhere in its log-probs, so hidden states and top-k log-probs need not
    be read here.

    Raises:
        NonFiniteError: with ``error``; names the rows.
    """
    names = [TEACHER_LOG_PROBS, *map(log_probs_of, table.further_passes)]
    found = {name: table.columns[name] for name in names if name in table.columns}
    if not found:
        return {}
    broken = sorted({row for values in found.values() for row in broken_rows(values, table.mask)})
    if broken and on_nonfinite == "error":
        raise NonFiniteError(
            describe("the teacher's log-probs", broken, table) + " Where the student's are fine, it is the teacher's "
            "prompt or its weights: look at sdar/context_tokens/max against the model's length, at "
            "sdar.teacher.source and at the precision of its pass. sdar.on_nonfinite=drop leaves such rows out of the "
            "distillation term and counts them."
        )
    if broken:
        # Zeros, too: what is computed from a row's numbers where its mask is 0 must not become NaN either.
        table.silence(broken, "the teacher's numbers are not finite")
        cleaned = {name: values.clone() for name, values in found.items()}
        for values in cleaned.values():
            values[broken] = 0
        table.write(cleaned | {TEACHER_MASK: table.mask.long()})
    return {"sdar/nonfinite_teacher_rows": len(broken)} if on_nonfinite == "drop" else {}
