"""Signals that weigh the turns of an episode: one factor for all tokens of a turn."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch

from sdar_verl.algorithm.advantages import FLAT
from sdar_verl.algorithm.masking import MAX_LOG_RATIO
from sdar_verl.algorithm.signals import SignalRows, register_signal
from sdar_verl.algorithm.turns import row_turns, turn_sums


@register_signal("advantage_factor", reads=("gap", "advantages", "turns"))
def advantage_factor(
    rows: SignalRows,
    *,
    strength: float,
    band: float = 0.2,
    prior: float | None = None,
    evidence: str = "belief",
    epsilon: float = 1e-6,
) -> torch.Tensor:
    """AgentOPSD (arXiv:2608.05987): a bounded factor per turn, from how the turn moved the belief in success.

        delta_k    = sum of Delta_t over the tokens of turn k
        logit V_k  = logit(prior) + delta_1 + ... + delta_k
        q_k        = V_k - V_(k-1), V_0 = prior              (``evidence="gap"``: q_k = delta_k)
        z_k        = (q_k - mean_j q_j) / (std_j q_j + epsilon)    over the turns of the episode, population std
        m_k        = clip(1 + band * sign(A) * z_k, 1 -+ band)
        A'         = A * [(1 - lambda) + lambda * m_k]

    A turn that moved the belief with the outcome gets more of the advantage, one that moved it against gets less; the
    sign never changes. ``prior`` is .5 where nothing is said. Because E[Delta_t] = -KL <= 0 the belief drifts to 0 over
    a long episode and stops moving; ``sdar.loss.centre=trajectory`` takes the drift out. A turn without a teacher is no
    evidence and keeps its advantage.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"advantage_factor has strength {strength}; it must lie in [0, 1]")
    if not 0.0 <= band < 1.0:
        raise ValueError(f"advantage_factor has band={band}; it must lie in [0, 1)")
    if evidence not in ("belief", "gap"):
        raise ValueError(f"advantage_factor has evidence={evidence!r}; known: belief, gap")
    if evidence == "gap" and prior is not None:
        raise ValueError(
            f"advantage_factor has prior={prior}, which has no effect without evidence=belief; leave it out, or "
            "set that"
        )
    prior = 0.5 if prior is None else prior
    if not 0.0 < prior < 1.0:
        raise ValueError(f"advantage_factor has prior={prior}; it must lie between 0 and 1")
    turn = row_turns(rows.response_mask)
    moved, tokens = turn_sums(rows.gap, rows.mask, turn)
    standing = torch.zeros_like(moved)
    for members in _turns_by_episode(rows, tokens > 0):
        where = tuple(torch.tensor(members, device=moved.device).T)
        increments = moved[where]
        if evidence == "belief":
            start = torch.full((1,), math.log(prior / (1.0 - prior)), dtype=moved.dtype, device=moved.device)
            increments = torch.sigmoid(torch.cat([start, start + increments.cumsum(0)])).diff()
        centred = increments - increments.mean()
        standing[where] = centred / (centred.square().mean().sqrt() + epsilon)
    base = rows.advantages
    factor = (1.0 + band * base.sign() * standing.gather(1, turn).to(base)).clamp(1.0 - band, 1.0 + band)
    return torch.where(rows.mask, base * ((1.0 - strength) + strength * factor), base)


def _turns_by_episode(rows: SignalRows, judged: torch.Tensor) -> list[list[tuple[int, int]]]:
    """Of every episode, the (row, turn in the row) pairs that ``judged`` (rows, turns) marks, in the order played."""
    members: dict[Hashable, list[tuple[int, int]]] = {}
    for row, turn in judged.nonzero().tolist():
        members.setdefault(rows.episode_ids[row], []).append((row, turn))
    return [sorted(group, key=lambda place: (rows.turns[place[0]], place[1])) for group in members.values()]


@register_signal("advantage_turn_weight", reads=("gap", "advantages", "turns"))
def advantage_turn_weight(
    rows: SignalRows, *, strength: float, clip: float = 0.2, floor: float = 0.1, epsilon: float = 1e-6
) -> torch.Tensor:
    """GRSD (arXiv:2607.28076): a factor per turn, from how its mean gap compares with the other turns of the group.

        d_k  = mean of Delta_t over turn k
        q_k  = exp(clip(sign(A) d_k, -+ 20)) - 1
        z_k  = q_k / (mean of abs(q) over the turns of the group + epsilon)
        A'   = A max(floor, 1 + lambda clip(z_k, -+ clip))

    The sign never changes. Only in groups that have both a return above 0 and one that is not; elsewhere A' = A. Turns
    without a teacher keep their advantage and are in no mean. lambda is .5; ``clip`` .2 is what all scripts set, 3 the
    released function's default.
    """
    if not clip > 0.0:
        raise ValueError(f"advantage_turn_weight has clip={clip}; it must be above 0")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"advantage_turn_weight has floor={floor}; it must lie in [0, 1]")
    turn = row_turns(rows.response_mask)
    sums, tokens = turn_sums(rows.gap, rows.mask, turn)
    outcome, _ = turn_sums(rows.advantages, rows.mask, turn)  # one number per turn: its sign is each token's
    size = torch.expm1((outcome.sign() * sums / tokens.clamp(min=1.0)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    judged = tokens > 0
    standing = torch.zeros_like(size)
    groups: dict[Hashable, list[int]] = {}
    for row, group in enumerate(rows.group_ids):
        groups.setdefault(group, []).append(row)
    for members in groups.values():
        played = rows.response_mask[members].any(dim=-1)  # a row that was taken out has lost nothing
        won = rows.scores[members][played] > 0
        inside = judged[members]
        if inside.any() and won.any() and not won.all():
            mean = size[members][inside].abs().mean()
            standing[members] = torch.where(inside, size[members] / (mean + epsilon), 0.0)
    factor = (1.0 + strength * standing.clamp(-clip, clip)).clamp(min=floor).gather(1, turn)
    return torch.where(rows.mask, rows.advantages * factor.to(rows.advantages), rows.advantages)


@register_signal("advantage_distance", reads=("gap", "advantages", "turns"))
def advantage_distance(rows: SignalRows, *, strength: float) -> torch.Tensor:
    """TIDE (arXiv:2609.35058): outcome and teacher side by side, both on the turns on which teacher and student differ.

        D_k  = mean of abs(Delta_t) over turn k
        D~, A~ = D and A of the turns of the episode, their smallest as 0, their largest as 1; all 1 where they are one
        A'_t = D~_k A_k + lambda A~_k D~_k Delta_t

    A_k is the advantage of the turn: the paper's, beta Q_k, is ``sdar.advantage.group_stats=anchor`` under
    ``sdar.loss.rl_coef`` (:func:`sdar_verl.algorithm.anchors.anchored_returns`); A~ does not depend on beta. The turn
    on which the two differ least has A' = 0. Turns without a teacher keep their advantage and are in no range. There is
    no code of the paper's: what is the token's and what the turn's is our reading (docs/fidelity.md).
    """
    turn = row_turns(rows.response_mask)
    sizes, tokens = turn_sums(rows.gap.abs(), rows.mask, turn)
    outcomes, _ = turn_sums(rows.advantages, rows.mask, turn)
    spread, standing = torch.zeros_like(sizes), torch.zeros_like(sizes)
    for members in _turns_by_episode(rows, tokens > 0):
        where = tuple(torch.tensor(members, device=sizes.device).T)
        for ranged, values in ((spread, sizes), (standing, outcomes)):
            ranged[where] = _ranged(values[where] / tokens[where])
    base, spread = rows.advantages, spread.gather(1, turn).to(rows.advantages)
    told = strength * standing.gather(1, turn).to(base) * rows.gap.to(base)
    return torch.where(rows.mask, spread * (base + told), base)


def _ranged(values: torch.Tensor) -> torch.Tensor:
    """Between 0 for the smallest and 1 for the largest; 1 where all are one."""
    low, high = values.min(), values.max()
    flat = high - low <= FLAT * torch.maximum(low.abs(), high.abs())
    return torch.ones_like(values) if flat else (values - low) / (high - low)
