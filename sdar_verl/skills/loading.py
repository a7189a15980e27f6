"""The bank of a run: read with what its environment knows of task types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdar_verl.config import SkillsConfig
from sdar_verl.envs.registry import known_envs, task_types_of
from sdar_verl.recipe import AGENT_LOOP
from sdar_verl.skills.bank import SkillBank


def load_run_bank(settings: SkillsConfig, env: str | None) -> SkillBank:
    """The bank of ``sdar.skills``, for the environment called ``env``; None where the tasks are a recipe's own.

    Raises:
        SkillBankError: see :meth:`SkillBank.load`; also a bank for another environment.
        ValueError: unknown environment.
        ImportError: the environment's extra is not installed.
    """
    types, aliases = task_types_of(env) if env is not None else ((), {})
    return SkillBank.load(settings.bank, task_types=types or None, renamed=settings.task_types, aliases=aliases)


RENAMED = "sdar.skills.task_types."


def bank_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's recorded settings those that say how its bank was read."""
    plays = settings.get("actor_rollout_ref.rollout.agent.default_agent_loop") == AGENT_LOOP
    env = {"sdar.env.name": settings.get("sdar.env.name")} if plays else {}
    return env | {name: value for name, value in settings.items() if name.startswith(RENAMED)}


def load_as_recorded(bank: str, settings: Mapping[str, Any]) -> SkillBank:
    """A bank, with its task types as in a run of these :func:`bank_settings`.

    A record is data: an environment that modules of the run register is not imported, and translates nothing.

    Raises:
        SkillBankError: see :func:`load_run_bank`.
    """
    own = {task_type for skill in SkillBank.load(bank) for task_type in skill.task_types}
    renamed = {name.removeprefix(RENAMED): new for name, new in settings.items() if name.startswith(RENAMED)}
    env = settings.get("sdar.env.name")
    used = SkillsConfig(bank=bank, task_types={name: new for name, new in renamed.items() if name in own})
    return load_run_bank(used, env if env in known_envs() else None)
