"""Signals: where the teacher enters the training objective.

The paper adds an auxiliary loss. Others leave the loss alone and re-weight or shape the advantages of the sampled
tokens. For the ``sampled`` objective the two are one: with a detached gate, the gradient of L_RL + lambda * Agg[g_t *
(log pi_T - log pi_theta)] is that of a policy gradient with advantage A_t + lambda * g_t (ADRS, arXiv:2608.03223), as
long as the policy gradient is neither clipped nor off-policy.

A signal is a pure function ``signal(rows, *, strength, **options) -> advantages``:

- ``rows``: :class:`SignalRows`, all rows of the step;
- ``strength``: lambda of this step (``sdar.loss.coef``, scheduled), >= 0;
- keywords of its own are its options, set in ``sdar.loss.signal_options``;
- ``advantages``: (rows, response_length), no gradient.

``loss`` leaves the advantages as they are: its lambda goes to the auxiliary loss in the actor's workers. A signal that
reads ``loss`` has both.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdar_verl.algorithm.advantages import rlsd_advantages
from sdar_verl.algorithm.masking import clean, returned
from sdar_verl.algorithm.registry import Registry
from sdar_verl.algorithm.turns import episode_means, turn_means

Signal = Callable[..., torch.Tensor]

READS = ("gap", "gate", "loss", "advantages", "turns", "token_mean")

Reads = Iterable[str] | Callable[[Mapping[str, Any]], Iterable[str]]


@dataclass(frozen=True)
class SignalRows:
    """All rows of a step; tensors (rows, response_length) unless said otherwise, without gradient.

    Attributes:
        advantages: as the estimator gave them; 0 where ``response_mask`` is off.
        response_mask: bool, sampled tokens.
        mask: bool, sampled tokens that have a teacher.
        old_log_probs: the student's at the weights the step began with, nats; 0 where ``mask`` is off.
        teacher_log_probs: the teacher's, nats; 0 where ``mask`` is off.
        gap: centred and clamped as ``sdar.loss.centre`` and ``clamp`` say, nats; 0 where ``mask`` is off.
        gate: g_t of the chosen gate; 0 where ``mask`` is off.
        episode_ids: (rows,), which rollout; unique over the step.
        group_ids: (rows,), which task (verl's uid).
        turns: (rows,), 0-based index of the row's first turn in its episode.
        scores: (rows,), return of the row's episode.
    """

    advantages: torch.Tensor
    response_mask: torch.Tensor
    mask: torch.Tensor
    old_log_probs: torch.Tensor
    teacher_log_probs: torch.Tensor
    gap: torch.Tensor
    gate: torch.Tensor
    episode_ids: Sequence[Hashable]
    group_ids: Sequence[Hashable]
    turns: Sequence[int]
    scores: torch.Tensor


_SIGNALS: Registry[Signal] = Registry("signal", ("strength",))


def register_signal(name: str, *, reads: Reads = ("gap", "gate")) -> Callable[[Signal], Signal]:
    """Decorator: make a signal selectable as ``name``. Raises ValueError when the name is taken.

    Args:
        name: what ``sdar.loss.signal`` is set to.
        reads: of :data:`READS`, or a function of its options that says so: ``gap``, ``gate``, ``advantages`` (it does
            nothing where all of them are 0), ``turns``, ``token_mean`` (its factors mean what they say under
            ``loss_agg_mode=token-mean`` alone), and ``loss``: the auxiliary loss is there beside it, with the same
            lambda. Options that shape anything else are errors, and so are those that take away what it reads.
    """
    return _SIGNALS.register(name, reads=reads)


def shapes_advantages(name: str) -> bool:
    """Whether the signal makes other advantages: all but ``loss``."""
    return get_signal(name) is not auxiliary_loss


def get_signal(name: str) -> Signal:
    """The signal called ``name``. Raises ValueError that lists the known names."""
    return _SIGNALS.get(name)


def list_signals() -> list[str]:
    """Names of all signals, sorted."""
    return _SIGNALS.names()


def signal_reads(name: str, what: str, options: Mapping[str, Any]) -> bool:
    """Whether the signal, with these options, looks at ``what`` (:func:`register_signal`)."""
    return what in _reads(name, options)


def _reads(name: str, options: Mapping[str, Any]) -> Iterable[str]:
    reads = _SIGNALS.fact(name, "reads")
    return reads(options) if callable(reads) else reads


def check_signal(name: str, strength: float, options: dict[str, Any]) -> None:
    """Try the signal on two rows.

    Raises:
        ValueError: an option the signal does not take, one that is missing, a value that it refuses, something else
            in its ``reads``; or see :func:`shaped_advantages`.
    """
    _SIGNALS.check_options(name, options)
    named = _reads(name, options)
    if isinstance(named, str) or not {*named} <= {*READS}:
        raise ValueError(f"signal {name!r} is registered with reads={named!r}; known: {', '.join(READS)}")
    on = torch.ones(2, 3, dtype=torch.bool)
    gap = torch.tensor([[0.0, -1.5, 0.3], [2.0, -0.2, 0.0]])
    advantages = torch.tensor([[1.0] * 3, [-1.0] * 3])
    old = torch.full_like(gap, -2.5)
    rows = SignalRows(
        advantages, on, on, old, old + gap, gap, torch.sigmoid(gap), ["a", "b"], ["g", "g"], [0, 0], advantages[:, 0]
    )
    shaped_advantages(name, rows, strength, options)


def shaped_advantages(name: str, rows: SignalRows, strength: float, options: Mapping[str, Any]) -> torch.Tensor:
    """What the signal makes of the advantages, 0 where ``rows.response_mask`` is off.

    Raises:
        ValueError: it gives another shape, NaN or infinity.
    """
    made = get_signal(name)(rows, strength=strength, **options)
    shaped = returned(f"signal {name!r}", made, rows.advantages.shape)
    return clean(f"signal {name}", shaped, rows.response_mask).to(rows.advantages.dtype)


@register_signal("loss", reads=("gap", "gate", "loss"))
def auxiliary_loss(rows: SignalRows, *, strength: float) -> torch.Tensor:
    """L_RL + lambda * L_SDAR (arXiv:2605.15155, equation 8): the advantages stay, the actor's loss gets the term."""
    return rows.advantages


@register_signal("advantage_weight", reads=("gap", "advantages"))
def advantage_weight(
    rows: SignalRows, *, strength: float, clip: float = 0.2, clip_low: float | None = None
) -> torch.Tensor:
    """RLSD: A_t * [(1 - lambda) + lambda * clip(exp(sign(A_t) * Delta_t), 1 -+ clip)]; lambda is 0.5 in the paper.

    ``clip_low`` is another bound below 1; 0 is one-sided.

    See :func:`sdar_verl.algorithm.advantages.rlsd_advantages`; here the gap may be centred and clamped first.
    """
    nothing = torch.zeros_like(rows.gap)
    return rlsd_advantages(
        rows.advantages,
        nothing,
        rows.gap,
        rows.response_mask,
        mix=strength,
        clip=clip,
        clip_low=clip_low,
        distill_mask=rows.mask,
    )


@register_signal("advantage_tilt", reads=("gap", "advantages"))
def advantage_tilt(rows: SignalRows, *, strength: float) -> torch.Tensor:
    """OCSD (arXiv:2608.04788): A_t * (1 + lambda * sign(A_t) * tanh(Delta_t / 2)).

    Delta_t is meant between the real next observation and a placeholder (``sdar.context.contrast``), on the turns that
    surprised the student (``sdar.context.turns_share``). Read in a summary, which gives no lambda; up to 1 the sign
    never changes.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"advantage_tilt has strength {strength}; it must lie in [0, 1]")
    base = rows.advantages
    tilted = base * (1.0 + strength * base.sign() * torch.tanh(rows.gap / 2).to(base))
    return torch.where(rows.mask, tilted, base)


def _shaping_reads(options: Mapping[str, Any]) -> tuple[str, ...]:
    seen = {"gap": ("gap",), "teacher": ()}.get(options.get("weight", "gate"), ("gap", "gate"))
    turns = ("turns",) if options.get("standardise") == "turn" else ()
    return (*seen, *turns, *(() if options.get("flat_groups", True) else ("advantages",)))


@register_signal("advantage_shaping", reads=_shaping_reads)
def advantage_shaping(
    rows: SignalRows,
    *,
    strength: float,
    weight: str = "gate",
    standardise: str = "none",
    reliability: str = "none",
    reliability_scale: float | None = None,
    flat_groups: bool = True,
    clip: float | None = None,
    epsilon: float = 1e-8,
) -> torch.Tensor:
    """ADRS (arXiv:2608.03223): A_t + clip(lambda * u * w_t, -+ clip), the teacher as a shaped reward per token.

    Args:
        rows: all rows of the step.
        strength: lambda (ADRS calls it eta; .02 with ``clip`` .2 in its scripts).
        weight: w_t. ``gate``: g_t, which makes the gradient that of the auxiliary loss with objective ``sampled``;
            ``gap``: Delta_t; ``teacher``: log pi_T(y_t | s_t+), ADRS's.
        standardise: ``none``; ``turn``: w minus its mean over the turn, divided by its standard deviation there
            (ADRS); ``group``: the same over all rows of the task.
        reliability: u. ``none``: 1; ``group``: sigmoid(reliability_scale * TVA), TVA = E[R | the teacher agrees] -
            E[R | it does not] over the rows of the task, agreement being sigmoid(mean log pi_T of the row - mean over
            all rows); R is the episode's return. A task whose rows all have one return has TVA 0.
        reliability_scale: tau, with ``reliability="group"`` alone; None: 2, as ADRS has it.
        flat_groups: False leaves a task alone whose advantages are all 0, as ADRS's code does.
        clip: largest change of an advantage; None: no limit.
        epsilon: added to standard deviations.
    """
    values = {"gate": rows.gate, "gap": rows.gap, "teacher": rows.teacher_log_probs}
    for option, value, known in (
        ("weight", weight, tuple(values)),
        ("standardise", standardise, ("none", "turn", "group")),
        ("reliability", reliability, ("none", "group")),
    ):
        if value not in known:
            raise ValueError(f"advantage_shaping has {option}={value!r}; known: {', '.join(known)}")
    if clip is not None and not clip > 0.0:
        raise ValueError(f"advantage_shaping has clip={clip}; it must be above 0 (None: no limit)")
    if reliability == "none" and reliability_scale is not None:
        raise ValueError(
            f"advantage_shaping has reliability_scale={reliability_scale}, which has no effect without "
            "reliability=group; leave it out, or set that"
        )
    shape = values[weight]
    if standardise != "none":
        turn = standardise == "turn"

        def mean(of: torch.Tensor) -> torch.Tensor:
            if turn:
                return turn_means(of, rows.mask, rows.response_mask)
            return episode_means(of, rows.mask, rows.group_ids)

        shape = shape - mean(shape)
        shape = shape / (mean(shape.square()).sqrt() + epsilon)
    change = strength * shape
    if reliability == "group":
        scale = 2.0 if reliability_scale is None else reliability_scale
        change = change * torch.sigmoid(scale * teacher_value(rows)).unsqueeze(-1).to(change)
    if clip is not None:
        change = change.clamp(-clip, clip)
    if not flat_groups:
        change = change * _group_has_advantage(rows).unsqueeze(-1).to(change)
    return torch.where(rows.mask, rows.advantages + change, rows.advantages)


def _nudge_reads(options: Mapping[str, Any]) -> tuple[str, ...]:
    divided = options.get("means", "one") == "two" or options.get("unpaired", "keep") == "drop"
    alone = () if options.get("flat", "keep") == "nudge" else ("advantages",)
    return ("gap", *alone, *(("token_mean",) if divided else ()))


@register_signal("advantage_nudge", reads=_nudge_reads)
def advantage_nudge(
    rows: SignalRows,
    *,
    strength: float,
    shape: str = "clip",
    scale: float = 0.2,
    least: float = 0.0,
    flat: str = "keep",
    means: str = "one",
    unpaired: str = "keep",
) -> torch.Tensor:
    """RLCSD (arXiv:2606.11709) and SIPO (arXiv:2609.36742): the gap pushes an advantage, and never past 0.

        r_t  = lambda tanh(Delta_t / scale)   (``shape="tanh"``),   lambda clip(Delta_t, -+ scale)   (``"clip"``)
        A'_t = max(A_t + r_t, 0) where A_t > 0,   min(A_t + r_t, 0) where A_t < 0       for abs(r_t) > least, else A_t
        A'_t = 0 where A_t = 0   (``flat="keep"``),   r_t there   (``"nudge"``)

    Both take Delta_t between a good and a bad context (``sdar.context.contrast``). RLCSD: tanh, scale .02, least .02,
    lambda .5; SIPO: clip, scale .2, ``flat="nudge"``, so that groups that all failed learn, too.

    Args:
        rows: all rows of the step.
        strength: lambda (SIPO calls it kappa).
        shape, scale, least, flat: see above; ``scale`` in nats.
        means: ``two``: RLCSD's loss, the token mean over the tokens that are not pushed *plus* that over those that
            are, as factors N/N_u and N/N_s on the advantages, for N sampled tokens in the step. PPO's loss is
            proportional to A, so a token mean of these is the sum of both means; exactly, with one mini-batch per step.
        unpaired: ``drop``: rows without a teacher get advantage 0 and are in neither mean (RLCSD takes them out of the
            update); ``keep``: they stay as they are.
    """
    for option, value, known in (
        ("shape", shape, ("clip", "tanh")),
        ("flat", flat, ("keep", "nudge")),
        ("means", means, ("one", "two")),
        ("unpaired", unpaired, ("keep", "drop")),
    ):
        if value not in known:
            raise ValueError(f"advantage_nudge has {option}={value!r}; known: {', '.join(known)}")
    if not scale > 0.0:
        raise ValueError(f"advantage_nudge has scale={scale}; it must be above 0")
    if not least >= 0.0:
        raise ValueError(f"advantage_nudge has least={least}; it must be at least 0")
    base = rows.advantages
    push = strength * (torch.tanh(rows.gap / scale) if shape == "tanh" else rows.gap.clamp(-scale, scale)).to(base)
    pushed = rows.mask & (push.abs() > least)
    cut = torch.where(base > 0, (base + push).clamp(min=0.0), (base + push).clamp(max=0.0))
    cut = torch.where(base == 0, push if flat == "nudge" else base, cut)
    shaped = torch.where(pushed, cut, base)
    if means == "one" and unpaired == "keep":
        return shaped
    counted = rows.response_mask
    if unpaired == "drop":
        counted = counted & rows.mask.any(dim=-1, keepdim=True)
    parts = (counted & pushed, counted & ~pushed) if means == "two" else (counted,)
    tokens, factor = rows.response_mask.sum().to(base), torch.zeros_like(base)
    for part in parts:
        factor = torch.where(part, tokens / part.sum().clamp(min=1), factor)
    return shaped * factor


def teacher_value(rows: SignalRows, epsilon: float = 1e-8) -> torch.Tensor:
    """ADRS's teacher value advantage of every row's task, (rows,): see :func:`advantage_shaping`; 0 for a lone row."""
    counted = rows.mask.any(dim=-1)
    tokens = rows.mask.double().sum(dim=-1).clamp(min=1.0)
    liking = torch.where(rows.mask, rows.teacher_log_probs.double(), 0.0).sum(dim=-1) / tokens
    value = torch.zeros_like(liking)
    if not counted.any():
        return value
    agreement = torch.sigmoid(liking - liking[counted].mean())
    groups: dict[Hashable, list[int]] = {}
    for row in counted.nonzero().flatten().tolist():
        groups.setdefault(rows.group_ids[row], []).append(row)
    for members in groups.values():
        if len(members) < 2:
            continue
        agree, score = agreement[members], rows.scores[members].double()
        with_teacher = (agree * score).sum() / (agree.sum() + epsilon)
        against = ((1.0 - agree) * score).sum() / ((1.0 - agree).sum() + epsilon)
        value[members] = with_teacher - against
    return value


def _group_has_advantage(rows: SignalRows) -> torch.Tensor:
    """(rows,) bool: some row of the task has an advantage other than 0."""
    largest = rows.advantages.abs().amax(dim=-1).tolist()
    strength: dict[Hashable, float] = {}
    for group, value in zip(rows.group_ids, largest, strict=True):
        strength[group] = max(strength.get(group, 0.0), value)
    return torch.tensor([strength[group] > 1e-6 for group in rows.group_ids], device=rows.advantages.device)
