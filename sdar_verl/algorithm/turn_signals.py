"""Signals that weigh the turns of an episode: one factor for all tokens of a turn."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch

from sdar_verl.algorithm.signal_rows import SignalRows, register_signal
from sdar_verl.algorithm.turns import row_turns, turn_sums


@register_signal("advantage_factor", reads=("gap",))
def advantage_factor(
    rows: SignalRows,
    *,
    strength: float,
    band: float = 0.2,
    prior: float = 0.5,
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
    sign never changes. Because E[Delta_t] = -KL <= 0 the belief drifts to 0 over a long episode and stops moving;
    ``sdar.loss.centre=trajectory`` takes the drift out. A turn without a teacher is no evidence and keeps its
    advantage.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"advantage_factor has strength {strength}; it must lie in [0, 1]")
    if not 0.0 <= band < 1.0:
        raise ValueError(f"advantage_factor has band={band}; it must lie in [0, 1)")
    if not 0.0 < prior < 1.0:
        raise ValueError(f"advantage_factor has prior={prior}; it must lie between 0 and 1")
    if evidence not in ("belief", "gap"):
        raise ValueError(f"advantage_factor has evidence={evidence!r}; known: belief, gap")
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
