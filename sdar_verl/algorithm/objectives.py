"""Objectives: what is minimised per token between teacher and student, before the gate.

An objective is a pure function ``objective(student_log_probs, teacher_log_probs, **signals) -> loss``:

- ``student_log_probs``: (batch, response_length), log pi_theta(y_t | s_t) of the sampled tokens in nats; carries the
  gradient;
- ``teacher_log_probs``: same shape, log pi_T(y_t | s_t+) of the very same tokens; detached by the caller;
- ``signals``: what else is known per token, at present ``old_log_probs`` (log pi_old(y_t | s_t), or None). An
  objective names those it reads and takes the rest as ``**_``;
- ``loss``: same shape, minimised.

Values are finite; at masked positions both log-probs are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdar_verl.algorithm.registry import Registry

Objective = Callable[..., torch.Tensor]

_OBJECTIVES: Registry[Objective] = Registry("objective")


def register_objective(name: str) -> Callable[[Objective], Objective]:
    """Decorator: make an objective selectable as ``name``. Raises ValueError when the name is taken."""
    return _OBJECTIVES.register(name)


def get_objective(name: str) -> Objective:
    """The objective called ``name``. Raises ValueError that lists the known names."""
    return _OBJECTIVES.get(name)


def list_objectives() -> list[str]:
    """Names of all objectives, sorted."""
    return _OBJECTIVES.names()


@register_objective("sampled")
def sampled(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, **_: Any) -> torch.Tensor:
    """log pi_T(y_t | s_t+) - log pi_theta(y_t | s_t), the surrogate of L_SDAR in arXiv:2605.15155.

    Its gradient is -grad log pi_theta(y_t | s_t): minimising it pushes every sampled token up, and the teacher has
    its say through the gate alone. The value is a number to watch, not a divergence: it has either sign, and a lower
    one does not mean a student closer to its teacher.
    """
    return teacher_log_probs - student_log_probs
