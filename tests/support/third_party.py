"""What another package would bring: a context and a gate of its own, named to a run by ``sdar.modules``."""

from __future__ import annotations

import torch

from sdar_verl.algorithm.gates import register_gate
from sdar_verl.context.builtin import sibling
from sdar_verl.context.registry import register_context

register_context("their_sibling", of_group=True)(lambda request, *, choice="first": sibling(request, choice=choice))


@register_gate("their_gate")
def their_gate(gap: torch.Tensor, **_: object) -> torch.Tensor:
    """A quarter, everywhere: a number that no gate of the package gives."""
    return torch.full_like(gap, 0.25)
