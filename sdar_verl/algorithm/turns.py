"""Turns and episodes within the rows of a step: what is summed, averaged or ranked over which tokens.

A turn is a maximal run of response tokens in a row: the whole response where each turn is a row, one stretch between
observations where a row is a conversation. An episode may have several rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch


def turn_means(values: torch.Tensor, mask: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Every distilled token gets the mean over the distilled tokens of its turn; 0 elsewhere."""
    turn = row_turns(response_mask)
    sums, counts = turn_sums(values, mask, turn)
    means = (sums / counts.clamp(min=1.0)).gather(1, turn)
    return torch.where(mask, means, 0.0).to(values.dtype)


def row_turns(response_mask: torch.Tensor) -> torch.Tensor:
    """Which turn of its row a response token belongs to, (rows, response_length), from 0; see above."""
    before = torch.nn.functional.pad(response_mask[:, :-1], (1, 0))
    return ((response_mask & ~before).long().cumsum(dim=-1) - 1).clamp(min=0)


def turn_sums(values: torch.Tensor, mask: torch.Tensor, turn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of ``values`` over the distilled tokens of every turn of every row, and their number.

    Args:
        values, mask: (rows, response_length).
        turn: (rows, response_length), :func:`row_turns`.

    Returns:
        Two tensors (rows, turns), float64; 0 where a row has fewer turns.
    """
    width = int(turn.max()) + 1 if turn.numel() else 1
    nothing = torch.zeros(turn.shape[0], width, dtype=torch.float64, device=values.device)
    sums = nothing.scatter_add(1, turn, torch.where(mask, values.double(), 0.0))
    return sums, nothing.scatter_add(1, turn, mask.double())


def turn_medians(values: torch.Tensor, mask: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Median over the distilled tokens of every turn of every row, (rows, turns), the mean of the two middle ones of an
    even number; 0 without any. Arguments as of :func:`turn_sums`.
    """
    width = int(turn.max()) + 1 if turn.numel() else 1
    group = torch.where(mask, turn, width)  # what is not distilled comes last
    order = values.argsort(dim=-1, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=-1, stable=True))
    ranked = values.gather(1, order)
    counts = torch.zeros(len(turn), width + 1, dtype=torch.long, device=turn.device)
    counts = counts.scatter_add(1, group, torch.ones_like(group))[:, :width]
    first = counts.cumsum(dim=-1) - counts
    last = values.shape[1] - 1
    low, high = ((first + place).clamp(0, last) for place in ((counts - 1).div(2, rounding_mode="floor"), counts // 2))
    middle = (ranked.gather(1, low) + ranked.gather(1, high)) / 2
    return torch.where(counts > 0, middle, 0.0)


def episode_means(values: torch.Tensor, mask: torch.Tensor, episode_ids: Sequence[Hashable]) -> torch.Tensor:
    """Every position of a row gets the mean over the distilled tokens of all rows of its episode (0 without any).

    Args:
        values: (rows, response_length).
        mask: (rows, response_length) bool.
        episode_ids: (rows,), unique over the step.
    """
    episode, episodes = numbered(episode_ids, values)
    sums = torch.zeros(episodes, dtype=torch.float64, device=values.device)
    counts = sums.index_add(0, episode, mask.double().sum(dim=-1))
    sums = sums.index_add(0, episode, torch.where(mask, values.double(), 0.0).sum(dim=-1))
    return (sums / counts.clamp(min=1.0))[episode].to(values.dtype).unsqueeze(-1).expand_as(values)


def numbered(ids: Sequence[Hashable], like: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Ids as consecutive numbers, and how many different ones there are."""
    if len(ids) != len(like):
        raise ValueError(f"episode_ids has {len(ids)} entries for {len(like)} rows")
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(name, len(numbers)) for name in ids]
    return torch.tensor(index, dtype=torch.long, device=like.device), len(numbers)
