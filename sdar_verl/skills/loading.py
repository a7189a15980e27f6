"""The bank of a run: read with what its environment knows of task types."""

from __future__ import annotations

from sdar_verl.config import SkillsConfig
from sdar_verl.envs.registry import task_types_of
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
