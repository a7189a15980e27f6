"""From the gap of a token to the gap that enters the gate: centring, clamping, averaging.

    Delta_t  = log pi_T(y_t | s_t+) - log pi_theta(y_t | s_t)                     per token, nats
    centred  = Delta_t - mean Delta        over the trajectory, or over all rows of the step (``centre``)
    clamped  = clip(centred, -clamp, +clamp)
    pooled   = mean of the clamped gap over the turn, or over the trajectory (``granularity``)

On-policy E[Delta_t] = -KL(student || teacher) <= 0, so the raw gap drifts below 0 and a gate on it weakens everything;
centring takes that drift away. A gap pooled over a turn or a trajectory judges the whole of it.

A worker sees micro-batches, which tear episodes apart. What spans rows (the trajectory's mean, the step's mean,
the divisor of the loss) is therefore computed once per step by the trainer, from the log-probs at the weights the step
began with (:func:`step_statistics`), and sent along with the rows: the loss and its gradient then do not depend on how
rows are dealt to micro-batches, mini-batches and ranks. With one update per step this is exact; with more, the later
ones use statistics of the first one's weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdar_verl.algorithm.gates import Ranges, gate_reads, gate_weight, value_ranges
from sdar_verl.algorithm.masking import active_mask, clean
from sdar_verl.algorithm.turns import episode_means, numbered, turn_means

GRANULARITIES = ("token", "turn", "trajectory")
CENTRES = ("none", "trajectory", "batch")
DIVISORS = ("tokens", "trajectory", "weights", "gap_bearing")


@dataclass(frozen=True)
class StepStatistics:
    """What a row must know of the others; all tensors (rows, response_length), None where no option asks for it.

    Attributes:
        shift: what centring takes off the gap: the mean of the row's trajectory, or of the step.
        pooled: mean of the centred and clamped gap over the row's trajectory.
        scale: factor on every token's loss that turns verl's token mean into the chosen mean.
        ranges: for gates that normalise over the step.
    """

    shift: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    ranges: Ranges | None = None


def gate_gap(
    gap: torch.Tensor,
    mask: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    granularity: str = "token",
    centre: str = "none",
    clamp: float | None = None,
    statistics: StepStatistics | None = None,
) -> torch.Tensor:
    """The gap as it enters the gate.

    Args:
        gap: (batch, response_length), nats, 0 where ``mask`` is off.
        mask: (batch, response_length) bool, distilled tokens.
        response_mask: (batch, response_length) bool; a turn is a maximal run of response tokens in a row.
        granularity: token, turn or trajectory.
        centre: none, trajectory or batch (the step).
        clamp: largest absolute value per token, nats; None: no limit.
        statistics: needed for ``centre`` other than none and for ``granularity="trajectory"``.

    Returns:
        (batch, response_length), 0 where ``mask`` is off.

    Raises:
        ValueError: an unknown name (the message lists the known), statistics that are needed and missing.
    """
    _known("granularity", granularity, GRANULARITIES)
    _known("centre", centre, CENTRES)
    if granularity == "trajectory":
        return torch.where(mask, _needed(statistics, "pooled", f"granularity={granularity}").to(gap), 0.0)
    shaped = token_gap(gap, mask, centre=centre, clamp=clamp, statistics=statistics)
    return turn_means(shaped, mask, response_mask) if granularity == "turn" else shaped


def token_gap(
    gap: torch.Tensor,
    mask: torch.Tensor,
    *,
    centre: str = "none",
    clamp: float | None = None,
    statistics: StepStatistics | None = None,
) -> torch.Tensor:
    """The centred and clamped gap of every token, (batch, response_length); see :func:`gate_gap`."""
    if centre != "none":
        gap = gap - _needed(statistics, "shift", f"centre={centre}").to(gap)
    if clamp is not None:
        if not clamp > 0.0:
            raise ValueError(f"clamp is {clamp}; it must be above 0 (None: no limit)")
        gap = gap.clamp(-clamp, clamp)
    return torch.where(mask, gap, torch.zeros_like(gap))


def step_statistics(
    old_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    episode_ids: Sequence[Hashable],
    *,
    distill_mask: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    gate: str = "gap",
    beta: float = 5.0,
    gate_options: Mapping[str, Any] | None = None,
    granularity: str = "token",
    centre: str = "none",
    clamp: float | None = None,
    divide_by: str = "tokens",
    gap_threshold: float = 0.05,
) -> StepStatistics:
    """What the rows of a step must know of each other, from the log-probs the step began with.

    The scale s_t multiplies every token's loss before verl's token mean over the mini-batch, sum_t s_t l_t / N_mini.
    With N response tokens and W distilled weight in the *step*:

    - ``tokens`` (the paper's denominator): no scale;
    - ``trajectory`` (the paper's Agg): s_t = N / (E n_e), for E episodes and n_e response tokens of the row's episode:
      the token mean of a trajectory, then the mean over trajectories;
    - ``weights``: s_t = N / sum_t g_t, a weighted mean of the objective;
    - ``gap_bearing``: s_t = N / B on the B distilled tokens with abs(Delta_t) >= ``gap_threshold``, 0 on the others:
      the mean over those tokens alone.

    Args:
        old_log_probs: (rows, response_length), what the gap is taken to: log pi_theta at the weights the step began
            with, or a teacher's with a bad context, nats.
        teacher_log_probs: (rows, response_length), nats.
        response_mask: (rows, response_length), bool or 0/1, all rows of the step, padding rows with no token.
        episode_ids: (rows,), which episode each row belongs to.
        distill_mask: as in :func:`sdar_verl.algorithm.loss.distillation_terms`.
        entropy: (rows, response_length), the student's, nats; for gates that read it.
        advantages: (rows, response_length); for gates that read them.
        gate, beta, gate_options, granularity, centre, clamp: the ``sdar.loss`` options of these names.
        divide_by: tokens, trajectory, weights or gap_bearing.
        gap_threshold: nats, for ``gap_bearing``.

    Raises:
        ValueError: an unknown name, shapes that do not fit, NaN or infinity at a distilled position.
    """
    _known("granularity", granularity, GRANULARITIES)
    _known("centre", centre, CENTRES)
    _known("divide_by", divide_by, DIVISORS)
    response, mask = response_mask.bool(), active_mask(response_mask, distill_mask)
    teacher = clean("teacher_log_probs", teacher_log_probs, mask).detach()
    gap = teacher - clean("old_log_probs", old_log_probs, mask).detach()

    shift = pooled = ranges = None
    if centre == "trajectory":
        shift = episode_means(gap, mask, episode_ids)
    elif centre == "batch":
        shift = episode_means(gap, mask, [0] * len(gap))
    shaped = token_gap(gap, mask, centre=centre, clamp=clamp, statistics=StepStatistics(shift=shift))
    if granularity == "trajectory":
        pooled = episode_means(shaped, mask, episode_ids)
    partial = StepStatistics(shift=shift, pooled=pooled)
    entering = gate_gap(gap, mask, response, granularity=granularity, centre=centre, clamp=clamp, statistics=partial)
    clean_entropy = None if entropy is None else clean("entropy", entropy, mask).detach()
    if gate_reads(gate, "ranges") and clean_entropy is not None:
        ranges = value_ranges(clean_entropy, entering, mask)

    scale = None
    if divide_by == "trajectory":
        scale = trajectory_scale(response, episode_ids)
    elif divide_by == "weights":
        weight = gate_weight(
            gate,
            entering,
            beta=beta,
            mask=mask,
            response_mask=response,
            entropy=clean_entropy,
            ranges=ranges,
            advantages=None if advantages is None else clean("advantages", advantages, mask),
            options=gate_options,
        )
        scale = _uniform_scale(response, torch.where(mask, weight.double(), 0.0).sum(), gap)
    elif divide_by == "gap_bearing":
        bearing = mask & (gap.abs() >= gap_threshold)
        scale = _uniform_scale(response, bearing.sum(), gap) * bearing
    return StepStatistics(shift=shift, pooled=pooled, scale=scale, ranges=ranges)


def _uniform_scale(response: torch.Tensor, divisor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    factor = float(response.sum()) / float(divisor) if divisor > 0 else 0.0
    return torch.full_like(like, factor)


def trajectory_scale(response: torch.Tensor, episode_ids: Sequence[Hashable]) -> torch.Tensor:
    """s_t of ``divide_by=trajectory``, (rows, response_length) float32; it needs no teacher."""
    episode, episodes = numbered(episode_ids, response)
    tokens = torch.zeros(episodes, dtype=torch.float64, device=response.device)
    tokens = tokens.index_add(0, episode, response.double().sum(dim=-1))
    played = (tokens > 0).sum().clamp(min=1)  # a padding row is an episode without tokens
    factor = tokens.sum() / (played * tokens.clamp(min=1.0))
    return factor[episode].float().unsqueeze(-1).expand_as(response)


def _needed(statistics: StepStatistics | None, name: str, option: str) -> torch.Tensor:
    value = None if statistics is None else getattr(statistics, name)
    if value is None:
        raise ValueError(f"{option} spans several rows: pass statistics=step_statistics(...) of all rows of the step")
    return value


def _known(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} is {value!r}; known: {', '.join(known)}")
