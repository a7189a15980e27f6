"""Returns that are compared where they were earned: among turns of a group with the same recent observations."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from sdar_verl.algorithm.advantages import FLAT, valid_rows


def anchored_returns(
    scores: torch.Tensor,
    group_ids: Sequence[Hashable],
    episode_ids: Sequence[Hashable],
    turns: Sequence[int],
    observations: Sequence[str],
    valid: torch.Tensor,
    *,
    discount: float = 0.95,
    depth: int = 3,
) -> torch.Tensor:
    """TIDE's advantage of every turn (arXiv:2609.35058): its return less that of others who stood where it stood.

        R_j    = discount^(T - 1 - j) R                        j = 0 ... T - 1 the episode's turns, R its reward
        Q^k_j  = R_j - mean of R over the turns of the group whose last k observations are those of turn j
        Q_j    = sum_k (k + 1) Q^k_j / sum_k (k + 1)           k = 1 ... depth, over those with Q^k_j other than 0

    The mean is over all such turns, the row itself and its own episode's other visits among them; a turn whose recent
    past nobody shares has Q^k = 0, and Q = 0 where that is so of every k. Near its start an episode has fewer than k
    observations, which are compared with other starts. The reward is taken as earned at the episode's end.

    Args:
        scores: (rows,), reward of the row's episode, the same on all its rows.
        group_ids: (rows,), which prompt.
        episode_ids: (rows,), which rollout; unique over all groups.
        turns: (rows,), 0-based index of the row in its episode.
        observations: (rows,), what the agent saw before the turn.
        valid: (rows,) bool; rows where it is False are in no mean and get 0.
        discount: in (0, 1].
        depth: the largest k, at least 1.

    Returns:
        (rows,), dtype of ``scores``, in units of the reward.

    Raises:
        ValueError: ``discount`` or ``depth`` out of range, lengths that differ, NaN or infinity in a valid score.
    """
    if not 0.0 < discount <= 1.0:
        raise ValueError(f"discount is {discount}; it must lie in (0, 1] (the paper uses .95)")
    if depth < 1:
        raise ValueError(f"depth is {depth}; it must be at least 1 (the paper uses 3)")
    rows = valid_rows(
        scores, valid, group_ids=group_ids, episode_ids=episode_ids, turns=turns, observations=observations
    )
    counted, played = {*rows}, {episode_ids[row] for row in rows}
    # Turns that were taken out have been played all the same; copies that fill a batch up are not played twice.
    episodes: dict[Hashable, dict[int, int]] = {name: {} for name in played}
    for row in sorted(range(len(scores)), key=lambda row: row not in counted):
        if episode_ids[row] in played:
            episodes[episode_ids[row]].setdefault(turns[row], row)

    returns = torch.zeros(len(scores), dtype=torch.float64)
    shared: dict[tuple[int, Hashable, tuple[str, ...]], list[int]] = {}  # k, group, last k observations -> rows
    for by_turn in episodes.values():
        members = [by_turn[turn] for turn in sorted(by_turn)]
        for place, row in enumerate(members):
            if row not in counted:
                continue
            returns[row] = discount ** (len(members) - 1 - place) * float(scores[row])
            for last in range(1, depth + 1):
                seen = tuple(observations[past] for past in members[max(0, place - last + 1) : place + 1])
                shared.setdefault((last, group_ids[row], seen), []).append(row)

    weighed, weights = torch.zeros_like(returns), torch.zeros_like(returns)
    for (last, _, _), members in shared.items():
        values = returns[members]
        centred = values - values.mean()
        apart = centred.abs() > FLAT * values.abs().max()
        weighed[members] += torch.where(apart, (last + 1) * centred, 0.0)
        weights[members] += (last + 1) * apart
    return (weighed / weights.clamp(min=1.0)).to(scores.dtype)
