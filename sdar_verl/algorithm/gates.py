"""Gates: how much of the distillation signal a token gets.

A gate is a pure function ``gate(gap, *, beta, **signals) -> weight``:

- ``gap``: (batch, response_length), Delta_t = log pi_T(y_t | s_t+) - log pi_theta(y_t | s_t), the teacher-student
  gap on the sampled token in nats; positive where the teacher, which sees the privileged context, likes the token
  better;
- ``beta``: sharpness, 1/nats, >= 0;
- ``signals``: what else is known per token, at present ``entropy`` (the student's, nats, or None). A gate names
  those it reads and takes the rest as ``**_``, so that later signals do not break it;
- ``weight``: same shape as ``gap``, in [0, 1].

Gaps are finite; at masked positions they are 0. The loss calls a gate without gradient: the
teacher acts through the size of the weight only. A gate of your own, in your own package::

    @register_gate("clipped")
    def clipped(gap, *, beta, **_):
        return (beta * gap).clamp(0.0, 1.0)

What a gate does on-policy. With the ``sampled`` objective every token is pushed up by its weight g(Delta_t); since
E_{y ~ pi_theta}[grad log pi_theta(y)] = 0, a constant weight has zero expected gradient and only the part of g that
varies with the token teaches. That is why ``none`` and ``half`` are controls with this objective and not
distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdar_verl.algorithm.registry import Registry

Gate = Callable[..., torch.Tensor]

_GATES: Registry[Gate] = Registry("gate")


def register_gate(name: str) -> Callable[[Gate], Gate]:
    """Decorator: make a gate selectable as ``name``. Raises ValueError when the name is taken."""
    return _GATES.register(name)


def get_gate(name: str) -> Gate:
    """The gate called ``name``. Raises ValueError that lists the known names."""
    return _GATES.get(name)


def list_gates() -> list[str]:
    """Names of all gates, sorted."""
    return _GATES.names()


@register_gate("gap")
def gap_gate(gap: torch.Tensor, *, beta: float, **_: Any) -> torch.Tensor:
    """g_t = sigmoid(beta * Delta_t), the paper's default (arXiv:2605.15155, gap gating).

    In expectation on-policy the ``sampled`` objective then has the signed weight sigmoid(beta*Delta) - 1/2 =
    tanh(beta*Delta/2)/2: tokens the teacher prefers go up, the others down, by at most 1/2. For small gaps that is
    beta/4 times the gradient of the reverse KL(student || teacher). beta -> infinity keeps only the sign of the gap;
    beta = 0 is ``half``.
    """
    return torch.sigmoid(beta * gap)


@register_gate("none")
def no_gate(gap: torch.Tensor, **_: Any) -> torch.Tensor:
    """g_t = 1: the objective as it is, no gating; with the ``sampled`` objective a control, see above."""
    return torch.ones_like(gap)


@register_gate("half")
def half_gate(gap: torch.Tensor, **_: Any) -> torch.Tensor:
    """g_t = 1/2: what the released code runs as OPSD and GRPO+OPSD (``gap`` at beta = 0)."""
    return torch.full_like(gap, 0.5)
