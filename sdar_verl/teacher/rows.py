"""The rows of a teacher pass: the teacher's prompt, followed by the very response ids that the student sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdar_verl.errors import TeacherError
from sdar_verl.rollout.rows import RowInfo

ROPE_AXES = 4
"""Position ids of a token where verl has a processor with ``get_rope_index``: in the text, and three for pictures."""


def teacher_row(
    prompt: torch.Tensor, response: torch.Tensor, response_mask: torch.Tensor, *, axes: int | None = None
) -> dict[str, torch.Tensor]:
    """One row as verl's engines read it.

    Args:
        prompt: (prompt tokens,).
        response: (response tokens,).
        response_mask: (response tokens,).
        axes: the model reads so many position ids of a token, which in a text are all the same.
    """
    input_ids = torch.cat([prompt.to(response.dtype), response])
    places = torch.arange(len(input_ids), device=input_ids.device)
    return {
        "prompts": prompt,
        "responses": response,
        "response_mask": response_mask,
        "loss_mask": response_mask,
        "input_ids": input_ids,
        "position_ids": places if axes is None else places.repeat(axes, 1),
    }


def rope_axes(processor: Any) -> int | None:
    """How many position ids verl gives a token of a model with this processor; None: one, without an axis for it."""
    return ROPE_AXES if hasattr(processor, "get_rope_index") else None


def deal(lengths: Sequence[int], ranks: int, balanced: Sequence[Sequence[int]]) -> list[int]:
    """An order of rows in which every rank has as many that the teacher scores as any other.

    verl deals a batch out in equal parts, in order.

    Args:
        lengths: (rows,) tokens of the teacher's sequence, 0 where it has no say.
        ranks: that rows are dealt to; their number divides that of the rows.
        balanced: per rank, places in :func:`scored_rows` of those that it scores.
    """
    scored = scored_rows(lengths, ranks)
    chosen = set(scored)
    others = iter([row for row in range(len(lengths)) if row not in chosen])
    share = len(lengths) // ranks
    order: list[int] = []
    for places in balanced:
        mine = [scored[place] for place in places]
        order += [*mine, *(next(others) for _ in range(share - len(mine)))]
    return order


def scored_rows(lengths: Sequence[int], ranks: int) -> list[int]:
    """Rows that the teacher scores, and as many others as make their number one that ``ranks`` divides."""
    seen = [row for row, length in enumerate(lengths) if length]
    missing = -len(seen) % ranks
    return [*seen, *[row for row, length in enumerate(lengths) if not length][:missing]]


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
    if any(info.teacher_prompt_tokens is not None or info.context_missing for info in rows):
        return
    if step > 1 and all(info.truncated or info.context_empty or info.foreign for info in rows):
        return
    if any(info.truncated for info in rows):
        raise TeacherError(
            "not one teacher prompt of this step fits sdar.teacher.max_prompt_length, so the teacher has no say on any "
            "row; raise it, or shorten the context (sdar.skills.max_tokens)"
        )
    if any(info.foreign for info in rows):
        raise TeacherError(
            "verl's own tokenisation makes not one prompt of this step of its messages, so the teacher has no say on "
            "any row; let the agent loop give extra_fields['teacher_prompt_ids'], or set sdar.teacher.source=none"
        )
    raise TeacherError(
        "the teacher sees no context on any row of this step, so it can only repeat the student; "
        "check sdar.context.sources (of skills: sdar.skills.bank and sdar.skills.retrieval) against the tasks, or set "
        "sdar.teacher.source=none"
    )
