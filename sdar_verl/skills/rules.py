"""The rules that look at the task and the bank alone. They read a task's description, type and id, never a prompt."""

from __future__ import annotations

import random

from sdar_verl.envs.base import Task
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.registry import register_retriever
from sdar_verl.skills.skill import Skill
from sdar_verl.skills.words import find_keyword, split_words


@register_retriever("none")
def none(bank: SkillBank, task: Task, seed: int) -> list[Skill]:
    """No skill."""
    return []


@register_retriever("full")
def full(bank: SkillBank, task: Task, seed: int) -> list[Skill]:
    """All skills."""
    return list(bank)


@register_retriever("random")
def random_skill(bank: SkillBank, task: Task, seed: int) -> list[Skill]:
    """One specific skill, drawn per task whatever it asks, and the general ones: the control for ``keyword``."""
    # A string seed is hashed the same way in every process, unlike hash().
    drawn = [random.Random(f"{seed}:{task.task_id}").choice(bank.specific)] if bank.specific else []
    return drawn + general_skills(bank)


@register_retriever("task_type")
def task_type(bank: SkillBank, task: Task, seed: int) -> list[Skill]:
    """Skills for the task's type, and the general ones."""
    return for_task_type(bank, task) + general_skills(bank)


@register_retriever("keyword")
def keyword(bank: SkillBank, task: Task, seed: int) -> list[Skill]:
    """Skills whose keywords the description names, in the order it names them, and the general ones."""
    return by_keyword(bank, task) + general_skills(bank)


@register_retriever("oracle")
def oracle(bank: SkillBank, task: Task, seed: int) -> list[Skill]:
    """The solution of this very task, as the context ``demonstration`` tells it, and no skill of the bank.

    An upper bound, not a method: nothing that a skill bank could hold tells a teacher more. Nothing where nobody knows
    a solution, which is counted like any task without a skill of its own.
    """
    from sdar_verl.context.base import ContextRequest
    from sdar_verl.context.builtin import demonstration

    text = demonstration(ContextRequest(task))
    if not text:
        return []
    return [Skill("oracle", "The solution of this task.", text, task_types=(task.task_type,))]


def for_task_type(bank: SkillBank, task: Task) -> list[Skill]:
    """Skills that name the task's type, in the bank's order."""
    return [skill for skill in bank if task.task_type in skill.task_types]


def by_keyword(bank: SkillBank, task: Task) -> list[Skill]:
    """Skills with a keyword that the task's description names, in the order in which it names them."""
    words = split_words(task.description)
    found = {}
    for skill in bank:
        positions = [find_keyword(word, words) for word in skill.keywords]
        if known := [position for position in positions if position is not None]:
            found[skill] = min(known)
    return sorted(found, key=lambda skill: found[skill])


def general_skills(bank: SkillBank) -> list[Skill]:
    """Skills that are for every task."""
    return [skill for skill in bank if skill.general]
