"""Which turns the teacher looks at, where it looks at some alone (``sdar.context.turns_share``)."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import compress

import torch

from sdar_verl.fields import LOOKED_AT
from sdar_verl.table import StepTable

logger = logging.getLogger(__name__)


def look_at_surprising(table: StepTable, share: float) -> float:
    """Let the teacher look at an episode's least likely turns alone: the other rows lose its prompts.

    Args:
        table: with old log-probs; of rows that hold one turn each.
        share: of an episode's rows with a teacher, above 0; their number is rounded up.

    Returns:
        Share of the rows with a teacher that it looks at; 1 without any.
    """
    table.read(["response_mask", "old_log_probs"])
    seen = table.mask
    tokens = seen.sum(dim=-1)
    # A number that is not finite is told later, with its row; it is no surprise here.
    old = torch.nan_to_num(table.columns["old_log_probs"].double(), 0.0, 0.0, 0.0)
    surprise = -torch.where(seen, old, 0.0).sum(dim=-1) / tokens.clamp(min=1)
    counted, episodes = (tokens > 0).tolist(), table.episode_ids
    looked_at = most_surprising(surprise.tolist(), counted, episodes, table.turns, share)
    if looked_at and max(Counter(compress(episodes, counted)).values()) == 1:
        logger.warning("sdar.context.turns_share=%s leaves out nothing in this step: no episode has two rows", share)
    table.forget_teacher([row for row in range(len(table.ids)) if row not in looked_at])
    table.write({LOOKED_AT: table.mask.long()})
    return len(looked_at) / sum(counted) if looked_at else 1.0


def most_surprising(
    surprise: Sequence[float],
    counted: Sequence[bool],
    episode_ids: Sequence[Hashable],
    turns: Sequence[int],
    share: float,
) -> set[int]:
    """Of each episode, the ``share`` of its rows with the largest ``surprise``, rounded up; of two alike, the earlier.

    Args:
        surprise: (rows,), nats a token.
        counted: (rows,), the row takes part.
        episode_ids: (rows,), unique over the step.
        turns: (rows,), index in the episode.
        share: in (0, 1].
    """
    episodes: dict[Hashable, list[int]] = {}
    for row, (episode, takes_part) in enumerate(zip(episode_ids, counted, strict=True)):
        if takes_part:
            episodes.setdefault(episode, []).append(row)
    chosen: set[int] = set()
    for rows in episodes.values():
        rows.sort(key=lambda row: (-surprise[row], turns[row]))
        chosen |= set(rows[: math.ceil(share * len(rows))])
    return chosen
