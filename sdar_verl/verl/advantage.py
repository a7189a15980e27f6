"""verl's advantage estimator ``sdar``: group-relative over trajectories, whatever their number of turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import register_adv_est

from sdar_verl.algorithm.advantages import GroupCounts, broadcast_to_tokens, trajectory_group_advantages
from sdar_verl.algorithm.anchors import anchored_returns
from sdar_verl.config import AdvantageConfig
from sdar_verl.errors import ConfigError
from sdar_verl.table import StepTable


@dataclass
class AdvantageRows:
    """What the estimator must know of the rows beyond verl's arguments, in the order of verl's tensors.

    Attributes:
        settings: the ``sdar.advantage`` node.
        episode_ids: which episode each row belongs to.
        valid: rows that count; False for padding rows and failed episodes.
        invalid_action: turns whose answer was not an admissible action.
        invalid_spans: (row, start, stop) of such turns within a conversation, in tokens of its response.
        turns: index of each row in its episode, from 0.
        observations: what the agent saw before each turn.
        counts: filled in by the estimator.
        advantages: (rows, response tokens), what the estimator gave.
    """

    settings: AdvantageConfig
    episode_ids: list[str]
    valid: torch.Tensor
    invalid_action: torch.Tensor
    invalid_spans: list[tuple[int, int, int]] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    observations: list[str] = field(default_factory=list)
    counts: GroupCounts | None = None
    advantages: torch.Tensor | None = None

    @classmethod
    def of(cls, settings: AdvantageConfig, table: StepTable) -> AdvantageRows:
        """From the records of a table."""
        infos = table.infos
        return cls(
            settings=settings,
            episode_ids=table.episode_ids,
            valid=torch.tensor([info is not None and not info.failed for info in infos]),
            invalid_action=torch.tensor([info is not None and info.invalid for info in infos]),
            invalid_spans=[
                (row, turn.start, turn.stop)
                for row, info in enumerate(infos)
                if info is not None
                for turn in info.turns
                if turn.invalid
            ],
            turns=table.turns,
            observations=["" if info is None else info.observation for info in infos],
        )


_rows: ContextVar[AdvantageRows | None] = ContextVar("sdar_advantage_rows", default=None)


@contextmanager
def advantage_rows(rows: AdvantageRows) -> Iterator[AdvantageRows]:
    """Hand ``rows`` to the estimator: verl passes an estimator no more than rewards, mask and group id."""
    token = _rows.set(rows)
    try:
        yield rows
    finally:
        _rows.reset(token)


@register_adv_est("sdar")
def compute_sdar_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any = None,
    index: np.ndarray | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's estimator interface over :func:`sdar_verl.algorithm.advantages.trajectory_group_advantages`.

    Args:
        token_level_rewards: (rows, response tokens).
        response_mask: (rows, response tokens).
        config: verl's algorithm node; ``norm_adv_by_std_in_grpo`` is read.
        index: (rows,) verl's group ids.
        **kwargs: verl's other arguments, not needed.

    Returns:
        Advantages and returns, both (rows, response tokens).

    Raises:
        ConfigError: under a trainer that does not say which row belongs to which episode.
    """
    rows = _rows.get()
    if rows is None or index is None:
        raise ConfigError(
            "algorithm.adv_estimator=sdar needs to know which row belongs to which episode; "
            "set trainer.v1.trainer_mode=sdar, or use adv_estimator=grpo with verl's own trainers"
        )
    row_scores = token_level_rewards.sum(dim=-1)
    if config is not None and config.get("use_kl_in_reward", False):
        row_scores = _episode_means(row_scores, rows.episode_ids, rows.valid)
    settings = rows.settings
    advantages, rows.counts = trajectory_group_advantages(
        row_scores,
        list(index),
        rows.episode_ids,
        rows.valid,
        group_stats="turn" if settings.group_stats == "turn" else "episode",
        norm_by_std=bool(config.get("norm_adv_by_std_in_grpo", True)) if config is not None else True,
        invalid_action=rows.invalid_action,
        invalid_action_penalty=settings.invalid_action_penalty,
    )
    if settings.group_stats == "anchor":  # the others' groups are counted all the same
        advantages = anchored_returns(
            row_scores,
            list(index),
            rows.episode_ids,
            rows.turns,
            rows.observations,
            rows.valid,
            discount=0.95 if settings.discount is None else settings.discount,
            depth=3 if settings.anchors is None else settings.anchors,
        )
        advantages -= settings.invalid_action_penalty * (rows.invalid_action & rows.valid).to(advantages)
    tokens = broadcast_to_tokens(advantages, response_mask)
    for row, start, stop in rows.invalid_spans:
        tokens[row, start:stop] -= settings.invalid_action_penalty * response_mask[row, start:stop]
    rows.advantages = tokens
    return tokens, tokens


def _episode_means(scores: torch.Tensor, episode_ids: Sequence[str], valid: torch.Tensor) -> torch.Tensor:
    """Every row gets its episode's mean over valid rows: verl puts the episode's reward on each row, and its KL penalty
    differs by row."""
    _, inverse = np.unique(np.asarray(episode_ids), return_inverse=True)
    groups, weights = torch.as_tensor(inverse), valid.double()
    totals, counts = torch.zeros(2, int(groups.max()) + 1, dtype=torch.float64)
    totals, counts = totals.index_add(0, groups, scores.double() * weights), counts.index_add(0, groups, weights)
    return (totals / counts.clamp(min=1.0))[groups].to(scores.dtype)
