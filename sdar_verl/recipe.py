"""Whose recipe a run is: one of our text environments, or one with agent loops of verl's or the user's."""

from __future__ import annotations

from omegaconf import DictConfig

from sdar_verl.config import SdarConfig

AGENT_LOOP = "sdar_agent"
"""The agent loop of the text environments."""

TAUGHT = "sdar_taught"
"""The one that runs another loop and adds the teacher's prompt (:mod:`sdar_verl.verl.taught_loop`)."""
INNER_COLUMN = "sdar_inner_agent"
"""Column of a prompt: the loop that plays it."""


def plays_environments(config: DictConfig) -> bool:
    """Whether the run's prompts are tasks of a text environment of ours (``sdar.env``)."""
    return config.actor_rollout_ref.rollout.agent.default_agent_loop == AGENT_LOOP


def env_of(config: DictConfig, sdar: SdarConfig) -> str | None:
    """Name of the text environment, None for other agent loops."""
    return sdar.env.name if plays_environments(config) else None
