"""Masks, bounds and input checks shared by the loss and the advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Beyond these, exponentials of a difference of log-probs would overflow, or one token outweigh all others.
MAX_LOG_RATIO = 20.0
"""Of teacher to student, nats: a token this far from its teacher teaches no less."""

MAX_LOG_IMPORTANCE = 10.0
"""Of student to sampler, nats."""

ROWS_NAMED = 8
"""Rows named in a message."""


class NonFiniteValues(ValueError):
    """NaN or infinity where a number counts.

    Attributes:
        rows: indices of the rows that hold it.
    """

    def __init__(self, text: str, rows: Sequence[int] = ()):
        super().__init__(text)
        self.rows = tuple(rows)


def active_mask(response_mask: torch.Tensor, distill_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions that take part in distillation: valid response tokens that have a teacher.

    Args:
        response_mask: (batch, response_length), bool or 0/1.
        distill_mask: None (every row has a teacher), (batch,) per row or (batch, response_length) per token.

    Returns:
        (batch, response_length) bool.

    Raises:
        ValueError: ``distill_mask`` has another shape.
    """
    mask = response_mask.bool()
    if distill_mask is None:
        return mask
    if distill_mask.shape == mask.shape[:1]:
        return mask & distill_mask.bool().unsqueeze(-1)
    if distill_mask.shape == mask.shape:
        return mask & distill_mask.bool()
    raise ValueError(
        f"distill_mask has shape {tuple(distill_mask.shape)}; expected (batch,) or (batch, response_length) "
        f"for a response_mask of shape {tuple(mask.shape)}"
    )


def returned(what: str, values: Any, shape: Sequence[int]) -> torch.Tensor:
    """What a registered function returned. ValueError unless it is a tensor of this shape."""
    if not isinstance(values, torch.Tensor) or values.shape != torch.Size(shape):
        given = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"{what} returned shape {given}; expected {tuple(shape)}")
    return values


def clean(name: str, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``values`` with 0 at masked positions, whatever they held, in at least float32; gradients pass where the mask
    is on.

    Multiplying by the mask would not do: NaN * 0 is NaN, forward and backward.

    Raises:
        ValueError: another shape than the mask.
        NonFiniteValues: NaN or infinity where the mask is on; names the tensor and the rows.
    """
    if values.shape != mask.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, but response_mask has {tuple(mask.shape)}")
    bad = mask & ~torch.isfinite(values)
    if bad.any():
        rows = bad.any(dim=-1).nonzero().flatten().tolist()
        named = ", ".join(map(str, rows[:ROWS_NAMED])) + (", ..." if len(rows) > ROWS_NAMED else "")
        raise NonFiniteValues(
            f"{name} holds NaN or infinity at {int(bad.sum())} unmasked positions, in {len(rows)} of {mask.shape[0]} "
            f"rows: {named}. Find out why these values are broken; leave rows without a teacher out with distill_mask.",
            rows,
        )
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    return torch.where(mask, values, torch.zeros_like(values))
