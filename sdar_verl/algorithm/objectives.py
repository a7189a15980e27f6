"""Objectives: what is minimised per token between teacher and student, before the gate.

An objective is a pure function ``objective(student_log_probs, teacher_log_probs, **signals) -> loss``:

- ``student_log_probs``: (batch, response_length), log pi_theta(y_t | s_t) of the sampled tokens in nats; carries the
  gradient;
- ``teacher_log_probs``: same shape, of the very same tokens: log pi_T(y_t | s_t+), or the anchored target's
  (``sdar.loss.anchor``); detached by the caller;
- ``signals``: what else is known per token: ``old_log_probs`` (log pi_old(y_t | s_t), detached, or None), ``mask``
  (bool, tokens that have a teacher) and, for objectives over distributions, ``divergence`` (with gradient). An
  objective names those it reads and takes the rest as ``**_``. A keyword that is no signal is an option of the
  objective, set in ``sdar.loss.objective_options``;
- ``loss``: same shape, minimised.

Values are finite; at masked positions both log-probs are 0.

With d = log pi_theta - log pi_T of the sampled token, rho = pi_theta / pi_old and y ~ pi_old, the expected gradients
are (KL is the reverse KL(student || teacher) of the position):

    sampled                 0 with a constant gate: the teacher acts through the gate alone
    k1  rho * sg[d]         grad KL; with returns-to-go, of the KL between the distributions of whole rows
    k2  d^2 / 2             grad KL on-policy (pi_old = pi_theta)
    k3  rho * (e^-d - 1 + d)  grad KL; without rho it is the gradient of the forward KL, on-policy
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sdar_verl.algorithm.divergences import DIVERGENCES
from sdar_verl.algorithm.masking import MAX_LOG_IMPORTANCE, MAX_LOG_RATIO
from sdar_verl.algorithm.registry import Registry

Objective = Callable[..., torch.Tensor]

SIGNALS = ("old_log_probs", "divergence", "mask")


_OBJECTIVES: Registry[Objective] = Registry("objective", SIGNALS)


def register_objective(name: str) -> Callable[[Objective], Objective]:
    """Decorator: make an objective selectable as ``name``. Raises ValueError when the name is taken."""
    return _OBJECTIVES.register(name)


def get_objective(name: str) -> Objective:
    """The objective called ``name``. Raises ValueError that lists the known names."""
    return _OBJECTIVES.get(name)


def list_objectives() -> list[str]:
    """Names of all objectives, sorted."""
    return _OBJECTIVES.names()


def check_objective_options(name: str, options: dict[str, Any]) -> None:
    """Raise ValueError for an option that the objective does not take, one that is missing, or a value that it refuses;
    TypeError where it does not take what the loss hands it."""
    _OBJECTIVES.check_options(name, options)
    token = torch.zeros(1, 1)
    signals = dict.fromkeys(SIGNALS, token) | {"mask": token == 0}
    get_objective(name)(token, token, **signals, **options)


@register_objective("sampled")
def sampled(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, **_: Any) -> torch.Tensor:
    """log pi_T(y_t | s_t+) - log pi_theta(y_t | s_t), the surrogate of L_SDAR in arXiv:2605.15155.

    Its gradient is -grad log pi_theta(y_t | s_t): minimising it pushes every sampled token up, and the teacher has
    its say through the gate alone. The value is a number to watch, not a divergence: it has either sign, and a lower
    one does not mean a student closer to its teacher.
    """
    return teacher_log_probs - student_log_probs


@register_objective("k1")
def k1(
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    *,
    old_log_probs: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    discount: float = 0.0,
    **_: Any,
) -> torch.Tensor:
    """rho_t * sg[d_t], d_t = log pi_theta - log pi_T: the reverse KL as a policy gradient with reward -d_t.

    With ``discount`` gamma above 0, d_t gives way to its return-to-go within the row, sum_{s >= t} gamma^(s - t) d_s
    (beta-OPSD, arXiv:2607.28582, equation 24): an early token answers for where it leads. gamma = 1 is the gradient of
    KL(pi_theta(y) || pi_T(y)) over whole rows, on-policy. s - t counts the tokens that have a teacher.

    This is how "minimise Agg(log pi_theta - log pi_T)" on sampled tokens (OPSD in arXiv:2605.15155) becomes a method:
    differentiating d_t itself would give grad log pi_theta, whose expectation is 0.
    """
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"k1 has discount={discount}; it must lie in [0, 1]")
    difference = (student_log_probs - teacher_log_probs).detach()
    if discount:
        difference = returns_to_go(difference, torch.ones_like(difference) if mask is None else mask, discount)
    return _importance(student_log_probs, old_log_probs, "k1") * difference


@register_objective("k2")
def k2(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, **_: Any) -> torch.Tensor:
    """d_t^2 / 2, d_t = log pi_theta - log pi_T; >= 0, biased as an estimate of the KL."""
    return 0.5 * (student_log_probs - teacher_log_probs).square()


@register_objective("k3")
def k3(
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    *,
    old_log_probs: torch.Tensor | None,
    importance: bool = True,
    **_: Any,
) -> torch.Tensor:
    """rho_t * (exp(-d_t) - 1 + d_t), d_t = log pi_theta - log pi_T: Skill-SD (arXiv:2605.15155, baseline Skill-SD).

    Both factors carry gradient, and rho * (k3 + 1 - exp(-d)) = rho * d is then the policy gradient of the reverse KL.
    ``importance=False`` leaves rho out: k3 as a plain penalty, >= 0, whose gradient is that of the forward KL.
    The exponents are cut at 20 (-d) and 10 (log rho) nats, as in the released code.
    """
    difference = student_log_probs - teacher_log_probs
    estimate = torch.exp((-difference).clamp(max=MAX_LOG_RATIO)) - 1.0 + difference
    return _importance(student_log_probs, old_log_probs, "k3") * estimate if importance else estimate


def returns_to_go(values: torch.Tensor, mask: torch.Tensor, discount: float, block: int = 128) -> torch.Tensor:
    """sum_{s >= t} discount^(s - t) values_s of every row, over the tokens of ``mask`` alone, and counting these alone.

    Args:
        values: (rows, tokens).
        mask: (rows, tokens), bool or 0/1.
        discount: in [0, 1].
        block: tokens that are summed by one product; powers of the discount stay representable within it.

    Returns:
        (rows, tokens), 0 where ``mask`` is off.
    """
    mask = mask.bool()
    order = torch.argsort((~mask).long(), dim=-1, stable=True)
    packed = values.masked_fill(~mask, 0.0).gather(-1, order)
    steps = torch.arange(min(block, packed.shape[-1]), device=values.device)
    lead = (steps - steps.unsqueeze(-1)).to(values.dtype)
    weights = torch.where(lead < 0, 0.0, discount ** lead.clamp(min=0))  # (t, s)
    later = packed.new_zeros(len(packed), 1)
    parts: list[torch.Tensor] = []
    for start in reversed(range(0, packed.shape[-1], block)):
        part = packed[:, start : start + block]
        size = part.shape[-1]
        tail = later * discount ** torch.arange(size, 0, -1, device=values.device, dtype=values.dtype)
        parts.append(part @ weights[:size, :size].T + tail)
        later = parts[-1][:, :1]
    summed = torch.cat(parts[::-1], dim=-1)
    return torch.zeros_like(values).scatter(-1, order, summed).masked_fill(~mask, 0.0)


def _over_distributions(kind: str) -> Objective:
    def objective(
        student_log_probs: torch.Tensor,
        teacher_log_probs: torch.Tensor,
        *,
        divergence: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if divergence is None:
            raise ValueError(f"objective {kind!r} reads the divergence of two distributions, which is not given")
        return divergence

    objective.__doc__ = f"""``{kind}`` of :mod:`sdar_verl.algorithm.divergences`, computed where the logits are."""
    return objective


for _kind in DIVERGENCES:
    register_objective(_kind)(_over_distributions(_kind))


def _importance(student: torch.Tensor, old: torch.Tensor | None, objective: str) -> torch.Tensor:
    """rho = pi_theta / pi_old of the sampled token, with gradient."""
    if old is None:
        raise ValueError(f"objective {objective!r} reads old_log_probs, which are not given")
    return torch.exp((student - old).clamp(max=MAX_LOG_IMPORTANCE))
