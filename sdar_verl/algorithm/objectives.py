"""Objectives: what is minimised per token between teacher and student, before the gate.

An objective is a pure function ``objective(student_log_probs, teacher_log_probs, **signals) -> loss``:

- ``student_log_probs``: (batch, response_length), log pi_theta(y_t | s_t) of the sampled tokens in nats; carries the
  gradient;
- ``teacher_log_probs``: same shape, of the very same tokens: log pi_T(y_t | s_t+), or the anchored target's
  (``sdar.loss.anchor``); detached by the caller;
- ``signals``: what else is known per token: ``old_log_probs`` (log pi_old(y_t | s_t), detached, or None) and ``mask``
  (bool, tokens that have a teacher). An objective names those it reads and takes the rest as ``**_``. A keyword that
  is no signal is an option of the objective, set in ``sdar.loss.objective_options``;
- ``loss``: same shape, minimised.

One that compares whole distributions is a divergence (:func:`register_divergence`), computed where the logits are.

Values are finite; at masked positions both log-probs are 0.

With d = log pi_theta - log pi_T of the sampled token, rho = pi_theta / pi_old and y ~ pi_old, the expected gradients
are (KL is the reverse KL(student || teacher) of the position):

    sampled                 0 with a constant gate: the teacher acts through the gate alone
    k1  rho * sg[d]         grad KL; with returns-to-go, of the KL between the distributions of whole rows
    k2  d^2 / 2             grad KL on-policy (pi_old = pi_theta)
    k3  rho * (e^-d - 1 + d)  grad KL; without rho it is the gradient of the forward KL, on-policy
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from sdar_verl.algorithm.divergences import ABSENT, DIVERGENCES, SUPPORT_OF, Divergence
from sdar_verl.algorithm.masking import MAX_LOG_IMPORTANCE, MAX_LOG_RATIO, clean, returned
from sdar_verl.algorithm.registry import Registry

Objective = Callable[..., torch.Tensor]

SIGNALS = ("old_log_probs", "mask")

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


def register_divergence(name: str, *, support: Literal["student", "teacher"]) -> Callable[[Divergence], Divergence]:
    """Decorator: make a divergence between next-token distributions selectable as the objective ``name``.

    It is a function ``divergence(student, teacher, **options) -> value`` of two log-probs (tokens, support), float32,
    each summing to 1, to (tokens,) nats; the gradient goes to ``student``. The support is the vocabulary, or the k
    tokens of ``sdar.loss.top_k`` and the rest of it. The logarithm of 0 is about -1e30, so that 0 log 0 is 0.
    It is evaluated in chunks of tokens where the logits are; its slope on the logits is made from autograd's on the
    log-probs. Keyword-only arguments are its options, set in ``sdar.loss.objective_options``.

    Args:
        name: what ``sdar.loss.objective`` is set to.
        support: whose k most likely tokens it is taken over (:mod:`sdar_verl.algorithm.divergences` says why).

    Raises:
        ValueError: the name is taken, or ``support`` is something else.
    """
    if support not in ("student", "teacher"):
        raise ValueError(f"register_divergence({name!r}) has support={support!r}; known: student, teacher")
    put = _OBJECTIVES.register(name)

    def enter(divergence: Divergence) -> Divergence:
        put(divergence)
        SUPPORT_OF[name] = support
        DIVERGENCES[name] = lambda p, q, **options: divergence(p.clamp(min=ABSENT), q.clamp(min=ABSENT), **options)
        return divergence

    return enter


def check_objective_options(name: str, options: dict[str, Any]) -> None:
    """Try the objective on three tokens.

    Raises:
        ValueError: an option that it does not take, one that is missing, a value that it refuses; or see
            :func:`loss_per_token`; or its loss has no gradient.
        TypeError: it does not take what the loss hands it.
    """
    _OBJECTIVES.check_options(name, options)
    teacher = torch.tensor([[-0.5, -1.0, -2.0]])
    student = (teacher - 0.25).requires_grad_()
    divergence = None
    if name in DIVERGENCES:
        logits = torch.arange(12.0).sin().view(3, 4).requires_grad_()
        divergence = DIVERGENCES[name](logits.log_softmax(-1), logits.detach().flip(-1).log_softmax(-1), **options)
        divergence = returned(f"divergence {name!r} of (3, 4) log-probs", divergence, (3,)).unsqueeze(0)
    loss = loss_per_token(
        name, student, teacher, options, old_log_probs=teacher - 0.2, mask=teacher < 0, divergence=divergence
    )
    if not loss.requires_grad:
        raise ValueError(f"objective {name!r} returned a loss without gradient; nothing could be learned from it")


def loss_per_token(
    objective: str,
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    options: Mapping[str, Any],
    *,
    old_log_probs: torch.Tensor | None,
    mask: torch.Tensor,
    divergence: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the objective gives, (rows, response_length), 0 where ``mask`` is off.

    Args:
        objective: registered name.
        student_log_probs, teacher_log_probs, old_log_probs: see the module.
        options: of the objective; those of a divergence are in its values.
        mask: bool, tokens that have a teacher.
        divergence: (rows, response_length), for an objective that is one.

    Raises:
        ValueError: unknown objective, another shape, NaN or infinity where ``mask`` is on, or a divergence is missing.
    """
    if objective in DIVERGENCES:
        if divergence is None:
            raise ValueError(f"objective {objective!r} reads the divergence of two distributions, which is not given")
        return clean("divergence", divergence, mask)
    function = get_objective(objective)
    loss = function(student_log_probs, teacher_log_probs, old_log_probs=old_log_probs, mask=mask, **options)
    return clean(f"what objective {objective!r} returned", returned(f"objective {objective!r}", loss, mask.shape), mask)


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


for _kind, _divergence in DIVERGENCES.items():
    _OBJECTIVES.register(_kind)(_divergence)


def _importance(student: torch.Tensor, old: torch.Tensor | None, objective: str) -> torch.Tensor:
    """rho = pi_theta / pi_old of the sampled token, with gradient."""
    if old is None:
        raise ValueError(f"objective {objective!r} reads old_log_probs, which are not given")
    return torch.exp((student - old).clamp(max=MAX_LOG_IMPORTANCE))
