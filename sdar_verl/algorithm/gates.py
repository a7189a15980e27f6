"""Gates: how much of the distillation signal a token gets.

A gate is a pure function ``gate(gap, *, beta, **signals) -> weight``:

- ``gap``: (batch, response_length), the teacher-student gap in nats, by default Delta_t = log pi_T(y_t | s_t+) -
  log pi_theta(y_t | s_t) on the sampled token: positive where the teacher, which sees the privileged context, likes
  the token better. Centring, clamping and averaging over a turn or a trajectory come before
  (:mod:`sdar_verl.algorithm.gap`);
- ``beta``: sharpness, 1/nats, >= 0;
- ``signals``: what else is known per token: ``entropy`` (the student's over the full vocabulary, nats, or None),
  ``mask`` (bool, distilled tokens), ``ranges`` (:class:`Ranges` of the whole step, or None), ``advantages`` (the
  policy gradient's), ``ratio`` (pi_theta / pi_old of the sampled token, detached) and ``turn`` (which turn of its row
  the token is in). A gate names those it reads and takes the rest as ``**_``, so that later signals do not break it.
  A keyword that is none of these is an option of the gate, set in ``sdar.loss.gate_options``;
- ``weight``: same shape as ``gap``, >= 0.

Gaps are finite; at masked positions they are 0. The loss calls a gate without gradient: the
teacher acts through the size of the weight only. A gate of your own, in your own package::

    @register_gate("clipped")
    def clipped(gap, *, beta, **_):
        return (beta * gap).clamp(0.0, 1.0)

What a gate does on-policy. With the ``sampled`` objective every token is pushed up by its weight g(Delta_t); since
E_{y ~ pi_theta}[grad log pi_theta(y)] = 0, a constant weight has zero expected gradient and only the part of g that
varies with the token teaches. That is why ``none`` and ``half`` are controls with this objective and not
distillation; nor is ``entropy``, whose weight is the same for every token that could have been sampled at a position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from sdar_verl.algorithm.masking import MAX_LOG_IMPORTANCE, clean, returned
from sdar_verl.algorithm.registry import Registry
from sdar_verl.algorithm.turns import row_turns, turn_medians, turn_sums

Gate = Callable[..., torch.Tensor]

SIGNALS = ("beta", "entropy", "mask", "ranges", "advantages", "ratio", "turn")
NORMS = ("none", "batch_minmax", "squash")

_GATES: Registry[Gate] = Registry("gate", SIGNALS)


class Ranges(NamedTuple):
    """Smallest and largest value over all distilled tokens of a step, nats: of the student's entropy and of the gap."""

    entropy_min: float
    entropy_max: float
    gap_min: float
    gap_max: float


def register_gate(name: str, *, reads_gap: bool = True) -> Callable[[Gate], Gate]:
    """Decorator: make a gate selectable as ``name``. Raises ValueError when the name is taken.

    Args:
        name: what ``sdar.loss.gate`` is set to.
        reads_gap: False for a gate that does not look at the gap; options that shape the gap are then errors.
    """
    return _GATES.register(name, reads_gap=reads_gap)


def get_gate(name: str) -> Gate:
    """The gate called ``name``. Raises ValueError that lists the known names."""
    return _GATES.get(name)


def list_gates() -> list[str]:
    """Names of all gates, sorted."""
    return _GATES.names()


def gate_reads(name: str, signal: str) -> bool:
    """Whether the gate looks at ``signal``: ``"gap"`` or one of :data:`SIGNALS`."""
    return bool(_GATES.fact(name, "reads_gap", True)) if signal == "gap" else _GATES.reads(name, signal)


def check_gate_options(name: str, options: dict[str, Any]) -> None:
    """Try the gate on two rows.

    Raises:
        ValueError: an option that the gate does not take, one that is missing, a value that it refuses; weights of
            another shape, negative, or not finite; a row's weights change with the rows beside it.
    """
    _GATES.check_options(name, options)
    gap = torch.tensor([[0.0, -1.5, 0.3], [2.0, -0.2, 0.0]])
    entropy, advantages = gap.abs().flip(-1), torch.tensor([[1.0] * 3, [-0.5] * 3])
    on = torch.ones_like(gap, dtype=torch.bool)
    ranges = value_ranges(entropy, gap, on)

    def weights(rows: slice) -> torch.Tensor:
        known = {"mask": on[rows], "response_mask": on[rows], "entropy": entropy[rows], "advantages": advantages[rows]}
        return gate_weight(name, gap[rows], beta=1.0, ranges=ranges, options=options, **known)

    apart = torch.cat([weights(slice(row, row + 1)) for row in range(len(gap))])
    if not torch.allclose(weights(slice(None)), apart, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"gate {name!r} gives a row other weights when it stands alone; rows are dealt to micro-batches and ranks "
            "at random, so it may look at its own row and at `ranges` alone"
        )


def gate_weight(
    gate: str,
    gap: torch.Tensor,
    *,
    beta: float,
    mask: torch.Tensor,
    response_mask: torch.Tensor,
    entropy: torch.Tensor | None = None,
    ranges: Ranges | None = None,
    advantages: torch.Tensor | None = None,
    log_ratio: torch.Tensor | None = None,
    options: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """What the gate gives, 0 where ``mask`` is off, with those of the signals that it reads; tensors (rows,
    response_length).

    Args:
        gate: registered name.
        gap: as it enters the gate.
        beta: sharpness.
        mask: bool, distilled tokens.
        response_mask: bool, sampled tokens.
        entropy, ranges, advantages: see the module.
        log_ratio: log pi_theta - log pi_old of the sampled tokens, nats; None: on-policy, all 0.
        options: of the gate.

    Raises:
        ValueError: the gate gives another shape, or weights below 0 or not finite where ``mask`` is on.
    """
    signals: dict[str, Any] = {"beta": beta, "entropy": entropy, "mask": mask, "ranges": ranges}
    signals["advantages"] = advantages
    if gate_reads(gate, "ratio"):
        signals["ratio"] = torch.ones_like(gap) if log_ratio is None else log_ratio.clamp(max=MAX_LOG_IMPORTANCE).exp()
    if gate_reads(gate, "turn"):
        signals["turn"] = row_turns(response_mask)
    weight = returned(f"gate {gate!r}", get_gate(gate)(gap, **signals, **(options or {})), gap.shape)
    weight = clean(f"what gate {gate!r} returned", weight.detach(), mask)
    if (weight < 0).any():
        raise ValueError(f"gate {gate!r} returned {weight.min().item():g}; a weight must be at least 0")
    return weight


@register_gate("gap")
def gap_gate(gap: torch.Tensor, *, beta: float, **_: Any) -> torch.Tensor:
    """g_t = sigmoid(beta * Delta_t), the paper's default (arXiv:2605.15155, gap gating).

    In expectation on-policy the ``sampled`` objective then has the signed weight sigmoid(beta*Delta) - 1/2 =
    tanh(beta*Delta/2)/2: tokens the teacher prefers go up, the others down, by at most 1/2. For small gaps that is
    beta/4 times the gradient of the reverse KL(student || teacher). beta -> infinity keeps only the sign of the gap;
    beta = 0 is ``half``.
    """
    return torch.sigmoid(beta * gap)


@register_gate("entropy", reads_gap=False)
def entropy_gate(gap: torch.Tensor, *, beta: float, entropy: torch.Tensor | None, **_: Any) -> torch.Tensor:
    """g_t = sigmoid(beta * h_t), h_t the student's entropy in nats (arXiv:2605.15155, entropy gating, an ablation).

    h_t >= 0, so the gate never attenuates below 1/2; with the ``sampled`` objective the teacher has no say at all.
    """
    return torch.sigmoid(beta * _given(entropy, "entropy", "entropy"))


@register_gate("soft_or")
def soft_or_gate(
    gap: torch.Tensor,
    *,
    beta: float,
    entropy: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    ranges: Ranges | None = None,
    norm: str,
    **_: Any,
) -> torch.Tensor:
    """g_t = sigmoid(beta * [1 - (1 - h_t)(1 - Delta_t)]) (arXiv:2605.15155, soft-OR gating, an ablation).

    A soft OR is one of numbers in [0, 1]. The paper does not say how entropy and gap get there, so ``norm`` has to be
    chosen:

    - ``none``: h and Delta in nats, as the formula is printed;
    - ``batch_minmax``: each by its smallest and largest value over the distilled tokens of the step (``ranges``;
      without them, of the tensors given), clamped to [0, 1];
    - ``squash``: tanh(h) and sigmoid(Delta), which need no statistics.
    """
    if norm not in NORMS:
        raise ValueError(f"soft_or has norm={norm!r}; known: {', '.join(NORMS)}")
    high = _given(entropy, "soft_or", "entropy")
    if norm == "squash":
        high, low = torch.tanh(high), torch.sigmoid(gap)
    elif norm == "batch_minmax":
        ranges = ranges or value_ranges(high, gap, torch.ones_like(gap, dtype=torch.bool) if mask is None else mask)
        high = _unit_range(high, ranges.entropy_min, ranges.entropy_max)
        low = _unit_range(gap, ranges.gap_min, ranges.gap_max)
    else:
        low = gap
    return torch.sigmoid(beta * (1.0 - (1.0 - high) * (1.0 - low)))


@register_gate("none", reads_gap=False)
def no_gate(gap: torch.Tensor, **_: Any) -> torch.Tensor:
    """g_t = 1: the objective as it is, no gating; with the ``sampled`` objective a control, see above."""
    return torch.ones_like(gap)


@register_gate("half", reads_gap=False)
def half_gate(gap: torch.Tensor, **_: Any) -> torch.Tensor:
    """g_t = 1/2: what the released code runs as OPSD and GRPO+OPSD (``gap`` at beta = 0)."""
    return torch.full_like(gap, 0.5)


@register_gate("calibrated")
def calibrated_gate(
    gap: torch.Tensor,
    *,
    beta: float,
    advantages: torch.Tensor | None,
    ratio: torch.Tensor,
    mask: torch.Tensor,
    turn: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """ICSD (arXiv:2608.14945): the gap gate, dealt out anew within each turn by what outcome and teacher say together.

        g_t = sigmoid(beta Delta_t),   u_t = A_t rho_t Delta_t,   mu = median of u over the turn
        m_t = exp((u_t - mu) / b-) / 2         for u_t < mu,    b- = mean abs(u - mu) over the turn's tokens below mu
        m_t = 1 - exp(-(u_t - mu) / b+) / 2    from mu on,      b+ = the same over the others
        w_t = g_t                              where A_t < 0 and Delta_t < 0: a failure that the teacher disowns, too
        w_t = a g_t m_t                        elsewhere, a = sum g / sum g m over these tokens of the turn

    Tokens on which teacher and outcome agree more than on the turn's middle one get more, the others less; a keeps what
    the turn has of weight in all, so w_t may exceed 1. On a turn where all u are one, m is 1/2 and w is g. Read in a
    summary only: that m is 1/2 where b is 0, and that mu is over all tokens of the turn, is this package's reading.
    """
    plain = torch.sigmoid(beta * gap)
    outcome = _given(advantages, "calibrated", "advantages")
    agreement = (outcome * ratio * gap).double()
    apart = agreement - turn_medians(agreement, mask, turn).gather(1, turn)
    rank = torch.zeros_like(apart)
    for side in (mask & (apart < 0), mask & (apart >= 0)):
        sums, counts = turn_sums(apart.abs(), side, turn)
        spread = (sums / counts.clamp(min=1.0)).gather(1, turn).clamp(min=torch.finfo(torch.double).tiny)
        tail = 0.5 * torch.exp(-apart.abs() / spread)
        rank = torch.where(side, torch.where(apart < 0, tail, 1.0 - tail), rank)
    dealt = mask & ~((outcome < 0) & (gap < 0))
    before, after = (turn_sums(weight, dealt, turn)[0].gather(1, turn) for weight in (plain, plain * rank))
    scaled = plain * rank * before / after.clamp(min=torch.finfo(torch.double).tiny)
    return torch.where(dealt, scaled.to(plain), plain)


def value_ranges(entropy: torch.Tensor, gap: torch.Tensor, mask: torch.Tensor) -> Ranges:
    """:class:`Ranges` over the positions where ``mask`` (bool, the tensors' shape) is on; all 0 when it is nowhere."""
    if not mask.any():
        return Ranges(0.0, 0.0, 0.0, 0.0)
    high, low = entropy[mask], gap[mask]
    return Ranges(high.min().item(), high.max().item(), low.min().item(), low.max().item())


def _unit_range(values: torch.Tensor, smallest: float, largest: float) -> torch.Tensor:
    """0 at ``smallest``, 1 at ``largest``; 0 everywhere when both are the same."""
    width = largest - smallest
    return ((values - smallest) / width).clamp(0.0, 1.0) if width > 0 else torch.zeros_like(values)


def _given(values: torch.Tensor | None, gate: str, what: str) -> torch.Tensor:
    if values is None:
        raise ValueError(f"gate {gate!r} reads the student's {what}, not given here")
    return values
