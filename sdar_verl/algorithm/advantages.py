"""Advantages of trajectories that are stored as one row per turn, and RLSD's re-weighting of them.

GRPO's advantage compares the rollouts of one prompt (arXiv:2402.03300, arXiv:2605.15155):

    A_i = (R_i - mean_j R_j) / (std_j R_j + epsilon)        j over the G rollouts of the prompt, std unbiased

When each turn is a row, a statistic over rows counts an episode as often as it has turns, and long (mostly failed)
episodes weigh more. Here each episode counts once and its advantage goes to all its turns; the other reading, the
released code's, is an option.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence, Sized
from dataclasses import dataclass
from typing import Literal

import torch

from sdar_verl.algorithm.masking import active_mask, clean

Ids = Sequence[Hashable] | torch.Tensor
"""One hashable id per row: list, NumPy array or tensor."""


FLAT = 1e-6
"""Scores this close, relative to the largest, are one score: float32 sums in another order differ by as much."""


@dataclass(frozen=True)
class GroupCounts:
    """What the statistics were made of; padding rows and failed rollouts are in none of these numbers.

    Attributes:
        rows: valid rows.
        episodes: episodes with at least one valid row.
        groups: prompts with at least one valid row.
        groups_without_variance: groups of two samples or more that all have the same score: their outcome advantage
            is 0 and they teach nothing.
        groups_of_one: groups of which a single episode is left, which has nothing to be compared with: its outcome
            advantage is 0, too.
    """

    rows: int
    episodes: int
    groups: int
    groups_without_variance: int
    groups_of_one: int


def trajectory_group_advantages(
    scores: torch.Tensor,
    group_ids: Ids,
    episode_ids: Ids,
    valid: torch.Tensor | None = None,
    *,
    group_stats: Literal["episode", "turn"] = "episode",
    norm_by_std: bool = True,
    epsilon: float = 1e-6,
    invalid_action: torch.Tensor | None = None,
    invalid_action_penalty: float = 0.0,
) -> tuple[torch.Tensor, GroupCounts]:
    """Group-relative advantage of every row.

    ``group_stats="episode"`` (the paper): mean and std over the episodes of a group, each once. Outcome and penalty
    are kept apart, A_row = A_episode - penalty * invalid_row: the penalty falls on its own turn alone, leaves the
    statistics as they are, and acts as much in a group where all episodes fail as elsewhere. Its unit is that of the
    advantage: the group's standard deviation with ``norm_by_std``, the reward without.

    ``group_stats="turn"`` (the released code): each row is a sample, and the penalty is taken from the row's score
    *before* mean and std over the rows of the group. Its unit is that of the reward. In a group where all episodes
    fail, the penalty is all the variance there is, and dividing by it makes it an advantage of order 1 however small
    it was.

    A group of which one episode is left, the others having failed, knows of no other and gets 0, less its own penalty
    (verl's GRPO takes mean 0 and std 1 there, so that its advantage is its raw score). A group without variance gets
    exactly 0 (verl's formula gives rounding error / epsilon there).

    Args:
        scores: (rows,), return of the row's episode, the same on all rows of the episode. Anything where ``valid``
            is False.
        group_ids: (rows,), which prompt the row belongs to (verl's uid).
        episode_ids: (rows,), which rollout; unique over all groups.
        valid: (rows,) bool; False for padding rows and failed rollouts: advantage 0, not in the statistics. None:
            all valid.
        group_stats: see above.
        norm_by_std: divide by the group's unbiased standard deviation (GRPO); False: only centre (Dr.GRPO).
        epsilon: added to the standard deviation; verl's GRPO has 1e-6.
        invalid_action: (rows,) bool, True where the turn's action was invalid.
        invalid_action_penalty: >= 0, see above for its unit and place; the released ALFWorld scripts use 0.1.

    Returns:
        advantages: (rows,), dtype of ``scores``, no gradient.
        counts: :class:`GroupCounts`.

    Raises:
        ValueError: unknown ``group_stats``; lengths that differ; NaN or infinity in a valid score; an episode in two
            groups or with two scores (``group_stats="episode"``); a negative penalty, or a penalty without
            ``invalid_action``.
    """
    if group_stats not in ("episode", "turn"):
        raise ValueError(f"group_stats is {group_stats!r}; known: episode (paper), turn (released code)")
    if not (math.isfinite(invalid_action_penalty) and invalid_action_penalty >= 0.0):
        raise ValueError(f"invalid_action_penalty is {invalid_action_penalty}; it must be finite and >= 0")
    if invalid_action_penalty > 0.0 and invalid_action is None:
        raise ValueError(f"invalid_action_penalty is {invalid_action_penalty}, but invalid_action is not given")
    rows = valid_rows(scores, valid, group_ids=group_ids, episode_ids=episode_ids, invalid_action=invalid_action)
    groups, episodes = _as_list(group_ids), _as_list(episode_ids)

    row_scores = scores.detach().double()
    penalty = torch.zeros_like(row_scores)
    if invalid_action is not None:
        penalty = invalid_action_penalty * invalid_action.to(penalty)
    within = torch.zeros_like(penalty)
    if group_stats == "turn":
        within = penalty
        samples = _samples_per_row(rows, groups)
    else:
        samples = _samples_per_episode(rows, groups, episodes, row_scores)

    advantages = torch.zeros_like(row_scores)
    flat_groups = single_groups = 0
    for members in samples.values():
        first = [sample[0] for sample in members]
        if len({episodes[row] for row in first}) == 1:
            single_groups += 1
            for sample in members:
                advantages[sample] = -penalty[sample]
            continue
        values = row_scores[first] - within[first]
        # Not bit for bit: a sum of rewards in another order would otherwise be blown up to a difference of one.
        flat = bool((values.max() - values.min()) <= FLAT * values.abs().max())
        flat_groups += flat
        normalised = torch.zeros_like(values) if flat else _normalise(values, norm_by_std, epsilon)
        for sample, advantage in zip(members, normalised, strict=True):
            advantages[sample] = advantage - (penalty - within)[sample]

    counts = GroupCounts(
        rows=len(rows),
        episodes=len({episodes[row] for row in rows}),
        groups=len(samples),
        groups_without_variance=flat_groups,
        groups_of_one=single_groups,
    )
    return advantages.to(scores.dtype if scores.is_floating_point() else torch.float32), counts


def broadcast_to_tokens(row_advantages: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Every valid response token of a row gets the row's advantage, all others 0.

    Args:
        row_advantages: (rows,).
        response_mask: (rows, response_length), bool or 0/1.

    Returns:
        (rows, response_length), dtype of ``row_advantages``.
    """
    return row_advantages.unsqueeze(-1) * response_mask.to(row_advantages.dtype)


def rlsd_advantages(
    advantages: torch.Tensor,
    old_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    mix: float = 0.5,
    clip: float = 0.2,
    clip_low: float | None = None,
    distill_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """RLSD: the teacher scales how much of the advantage a token gets (arXiv:2605.15155, baseline RLSD, the paper's
    form).

        delta_t = log pi_T(y_t | s_t+) - log pi_old(y_t | s_t)
        w_t     = clip(exp(sign(A_t) * delta_t), 1 - clip, 1 + clip)
        A'_t    = A_t * [(1 - mix) + mix * w_t]

    A token the teacher likes better gets more of a positive advantage and less of a negative one. The sign of the
    advantage never changes.

    Args:
        advantages: (batch, response_length).
        old_log_probs: (batch, response_length), log-probs of the sampling policy, nats.
        teacher_log_probs: (batch, response_length), of the same tokens, nats.
        response_mask: (batch, response_length), bool or 0/1.
        mix: share of the re-weighted advantage, in [0, 1]; the paper's lambda. 0 leaves the advantages as they are.
        clip: half-width of the clip range, in [0, 1).
        clip_low: how far below 1 the weight may go; None: ``clip``. 0 is one-sided: credit and blame are only added to;
            ``clip=0`` with a ``clip_low`` only takes away.
        distill_mask: (batch,) or (batch, response_length), False where there is no teacher log-prob; the advantage
            stays as it is there.

    Returns:
        (batch, response_length), no gradient; 0 where the response mask is off.

    Raises:
        ValueError: ``mix`` or ``clip`` out of range, shapes that do not fit, NaN or infinity at an unmasked position.
    """
    if not 0.0 <= mix <= 1.0:
        raise ValueError(f"mix is {mix}; it must lie in [0, 1] (the paper uses 0.5)")
    if not 0.0 <= clip < 1.0:
        raise ValueError(f"clip is {clip}; it must lie in [0, 1) (the paper uses 0.2)")
    below = clip if clip_low is None else clip_low
    if not 0.0 <= below < 1.0:
        raise ValueError(f"clip_low is {clip_low}; it must lie in [0, 1)")
    mask = active_mask(response_mask, distill_mask)
    base = clean("advantages", advantages, response_mask.bool()).detach()
    teacher = clean("teacher_log_probs", teacher_log_probs, mask).detach()
    old = clean("old_log_probs", old_log_probs, mask).detach()

    weight = torch.exp(base.sign() * (teacher - old)).clamp(1.0 - below, 1.0 + clip)
    return torch.where(mask, base * ((1.0 - mix) + mix * weight), base)


def _normalise(values: torch.Tensor, norm_by_std: bool, epsilon: float) -> torch.Tensor:
    centred = values - values.mean()
    return centred / (values.std(unbiased=True) + epsilon) if norm_by_std else centred


def _samples_per_row(rows: list[int], groups: list[Hashable]) -> dict[Hashable, list[list[int]]]:
    """Group -> its samples, each a list with the one row it is made of."""
    samples: dict[Hashable, list[list[int]]] = {}
    for row in rows:
        samples.setdefault(groups[row], []).append([row])
    return samples


def _samples_per_episode(
    rows: list[int], groups: list[Hashable], episodes: list[Hashable], scores: torch.Tensor
) -> dict[Hashable, list[list[int]]]:
    """Group -> its samples, each a list of the rows of one episode, which share group and score."""
    by_episode: dict[Hashable, list[int]] = {}
    for row in rows:
        by_episode.setdefault(episodes[row], []).append(row)
    samples: dict[Hashable, list[list[int]]] = {}
    for episode, members in by_episode.items():
        first = members[0]
        for row in members[1:]:
            if groups[row] != groups[first]:
                raise ValueError(
                    f"episode {episode!r} has rows in groups {groups[first]!r} and {groups[row]!r}; "
                    "episode_ids must be unique over all groups"
                )
            if scores[row] != scores[first]:
                raise ValueError(
                    f"episode {episode!r} has rows with scores {float(scores[first])} and {float(scores[row])}; "
                    "scores holds the return of the whole episode, the same on each of its rows"
                )
        samples.setdefault(groups[first], []).append(members)
    return samples


def valid_rows(scores: torch.Tensor, valid: torch.Tensor | None, **columns: Sized | None) -> list[int]:
    """Indices of the valid rows.

    Raises:
        ValueError: a column has another length than ``scores``, (rows,), which hold NaN or infinity where they count.
    """
    if scores.dim() != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; expected (rows,)")
    for name, column in {**columns, "valid": valid}.items():
        if column is not None and len(column) != len(scores):
            raise ValueError(f"{name} has {len(column)} entries for {len(scores)} rows")
    keep = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.bool()
    bad = (keep & ~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"scores holds NaN or infinity in valid rows {bad[:8]} ({len(bad)} in all); mark failed rollouts in valid"
        )
    return keep.nonzero().flatten().tolist()


def _as_list(ids: Ids) -> list[Hashable]:
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)
