"""What a distillation loss is made of, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DistillationTerms:
    """What the loss is made of, per token; tensors (batch, response_length), the first four 0 (False) outside ``mask``.

    Attributes:
        loss: l_t = s_t * w_t * g_t * objective (s_t: scale of the chosen divisor, w_t: importance weight, both 1 by
            default); the only tensor that carries a gradient, and that to the student alone.
        gate: g_t, detached.
        gap: Delta_t in nats, detached, before centring and the like.
        mask: bool, valid response tokens that have a teacher.
        response_mask: bool, valid response tokens.
    """

    loss: torch.Tensor
    gate: torch.Tensor
    gap: torch.Tensor
    mask: torch.Tensor
    response_mask: torch.Tensor
