"""What can be wrong with ``sdar.skills`` and is known before Ray starts."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from sdar_verl.checks.options import flat
from sdar_verl.checks.panel_tasks import panel_tasks
from sdar_verl.config import SdarConfig
from sdar_verl.envs.base import Task
from sdar_verl.errors import SdarError
from sdar_verl.recipe import env_of
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.loading import load_run_bank
from sdar_verl.skills.registry import RetrievalError, check_rules, get_rule
from sdar_verl.skills.retrieval import Retrieval, asked_in, retrieve

PROBED_TASKS = 200
"""Training tasks, spread over the panel, whose skills are looked up before the start."""


def skill_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Faults of the ``sdar.skills`` node, one text each: bank, rules, options, and what they give on the panel."""
    settings, faults = sdar.skills, []
    try:
        check_rules(settings.retrieval, settings.options)
    except RetrievalError as error:
        faults.append(f"sdar.skills.retrieval: {error}")
    try:
        bank = load_run_bank(settings, env_of(config, sdar))
    except (ValueError, ImportError, OSError) as error:
        # Of an unknown environment, or one that is not installed, the check of sdar.env tells.
        return faults + ([f"sdar.skills.bank: {error}"] if not _environment_fault(sdar) else _without_types(sdar))
    if settings.max_tokens is not None and settings.retrieval == ["none"]:
        faults.append(f"sdar.skills.max_tokens={settings.max_tokens} has no effect with sdar.skills.retrieval=[none]")
    if faults or settings.retrieval == ["none"]:
        return faults
    tasks = spread(panel_tasks(config, "train_files"), PROBED_TASKS)
    if settings.column is not None and tasks:
        try:
            read = any(asked_in(task, settings.column).description.strip() for task in tasks)
        except RetrievalError as error:
            return [str(error)]
        if not read:
            return [
                f"sdar.skills.column={settings.column} has no text in {len(tasks)} rows of data.train_files; their "
                f"data are {', '.join(sorted(flat(tasks[0].data))) or 'empty'}"
            ]
    return _probe(tasks, bank, sdar)


def retrieve_for_run(bank: SkillBank, task: Task, sdar: SdarConfig) -> Retrieval:
    """What the run's rules find for ``task`` at its first step, before any budget.

    Raises:
        RetrievalError: a rule fails.
    """
    settings = sdar.skills
    return retrieve(bank, asked_in(task, settings.column), settings.retrieval, settings.seed, settings.options)


def spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """At most ``count`` of ``tasks``, at equal distances."""
    number = min(count, len(tasks))
    return [tasks[at * len(tasks) // number] for at in range(number)]


def _probe(tasks: Sequence[Task], bank: SkillBank, sdar: SdarConfig) -> list[str]:
    matched = 0
    for task in tasks:
        try:
            matched += not retrieve_for_run(bank, task, sdar).no_match
        except (RetrievalError, SdarError) as error:
            return [f"sdar.skills.retrieval={sdar.skills.retrieval}: {error}"]
    if not tasks or matched or not bank.specific or all(get_rule(n).learns for n in sdar.skills.retrieval):
        return []
    types = sorted({task.task_type for task in tasks})
    return [
        f"sdar.skills.bank={sdar.skills.bank}: none of its {len(bank.specific)} specific skills is found by "
        f"sdar.skills.retrieval={sdar.skills.retrieval} for any of {len(tasks)} tasks of data.train_files (task types "
        f"{', '.join(types[:8])}): is it a bank for another environment than {sdar.env.name}? Choose another bank or "
        "rule, or translate its task types with sdar.skills.task_types"
    ]


def _environment_fault(sdar: SdarConfig) -> bool:
    from sdar_verl.envs.registry import task_types_of

    try:
        task_types_of(sdar.env.name)
    except (ValueError, ImportError):
        return True
    return False


def _without_types(sdar: SdarConfig) -> list[str]:
    try:
        SkillBank.load(sdar.skills.bank, renamed=sdar.skills.task_types)
    except (ValueError, OSError) as error:
        return [f"sdar.skills.bank: {error}"]
    return []
