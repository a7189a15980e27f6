"""Retrieval rules: which skills of a bank the teacher sees for a task.

A rule is a pure function ``(bank, task, seed) -> skills`` registered under a name; :func:`retrieve` applies one rule
or several in order. Rules read the task's description and type, never an observation or a whole prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sdar_verl.envs.base import Task
from sdar_verl.skills.bank import Skill, SkillBank

Retriever = Callable[[SkillBank, Task, int], list[Skill]]
_RETRIEVERS: dict[str, Retriever] = {}
# A run of letters and digits: what counts as a word of a description or a keyword.
_WORD = re.compile(r"[^\W_]+")


class RetrievalError(ValueError):
    """An unknown retrieval rule, or a name that is taken."""


@dataclass(frozen=True)
class Retrieval:
    """What was found for one task.

    Attributes:
        skills: the specific skills first, in the order of the rules, then the general ones; no duplicates.
        no_match: skills were asked for, but none is specific to the task; to be counted.
    """

    skills: tuple[Skill, ...]
    no_match: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the skills, in order."""
        return tuple(skill.name for skill in self.skills)


def register_retriever(name: str) -> Callable[[Retriever], Retriever]:
    """Decorator that makes a rule available under ``name``.

    Raises:
        RetrievalError: ``name`` is taken.
    """

    if name in _RETRIEVERS:
        raise RetrievalError(f"retrieval rule {name!r} is registered already; choose another name")

    def register(retriever: Retriever) -> Retriever:
        _RETRIEVERS[name] = retriever
        return retriever

    return register


def retriever_names() -> list[str]:
    """Names of the registered rules."""
    return sorted(_RETRIEVERS)


def check_rules(rules: str | Sequence[str]) -> list[str]:
    """``rules`` as a list of registered names.

    Raises:
        RetrievalError: an unknown rule, or none at all; `none` among others, which would have no effect.
    """
    names = [rules] if isinstance(rules, str) else list(rules)
    unknown = [name for name in names if name not in _RETRIEVERS]
    if unknown or not names:
        raise RetrievalError(f"unknown retrieval rules {unknown or names}; use some of {retriever_names()}")
    if "none" in names and len(names) > 1:
        raise RetrievalError(f"retrieval rules {names}: 'none' has no effect beside others; leave it out or alone")
    return names


def retrieve(bank: SkillBank, task: Task, rules: str | Sequence[str], seed: int = 0) -> Retrieval:
    """Skills of ``bank`` for ``task``.

    Args:
        bank: where to look.
        task: its description, type and id are read.
        rules: a rule's name, or several: their results follow each other, without duplicates.
        seed: for rules that draw; the same task gets the same skills under the same seed.
    Raises:
        RetrievalError: see :func:`check_rules`.
    """
    names = check_rules(rules)
    found = [skill for name in names for skill in _RETRIEVERS[name](bank, task, seed)]
    unique = list({skill.name: skill for skill in found}.values())
    specific = [skill for skill in unique if not skill.general]
    general = [skill for skill in unique if skill.general]
    return Retrieval(skills=(*specific, *general), no_match=names != ["none"] and not specific)


def render_skills(skills: Iterable[Skill]) -> str:
    """Text for the prompt's skill slot; empty without skills."""
    return "\n\n".join(skill.text for skill in skills)


@register_retriever("none")
def _none(bank: SkillBank, task: Task, seed: int) -> list[Skill]:
    return []


@register_retriever("full")
def _full(bank: SkillBank, task: Task, seed: int) -> list[Skill]:
    return list(bank)


@register_retriever("random")
def _random(bank: SkillBank, task: Task, seed: int) -> list[Skill]:
    """One specific skill, drawn per task whatever it asks, and the general ones: the control for ``keyword``."""
    specific = [skill for skill in bank if not skill.general]
    # A string seed is hashed the same way in every process, unlike hash().
    drawn = [random.Random(f"{seed}:{task.task_id}").choice(specific)] if specific else []
    return drawn + _general(bank)


@register_retriever("task_type")
def _task_type(bank: SkillBank, task: Task, seed: int) -> list[Skill]:
    """Skills for the task's type, and the general ones."""
    return [skill for skill in bank if task.task_type in skill.task_types] + _general(bank)


@register_retriever("keyword")
def _keyword(bank: SkillBank, task: Task, seed: int) -> list[Skill]:
    """Skills whose keywords the description names, in the order it names them, and the general ones."""
    words = _WORD.findall(task.description)
    found = {}
    for skill in bank:
        positions = [_find_keyword(keyword, words) for keyword in skill.keywords]
        if known := [position for position in positions if position is not None]:
            found[skill] = min(known)
    return sorted(found, key=lambda skill: found[skill]) + _general(bank)


def _general(bank: SkillBank) -> list[Skill]:
    return [skill for skill in bank if skill.general]


def _find_keyword(keyword: str, words: Sequence[str]) -> int | None:
    """Index in ``words`` where ``keyword`` begins; None when it is not there.

    AlarmClock, alarmclock, alarm clock and alarm-clock are one keyword; so are singular and plural.
    """
    keyword = "".join(_WORD.findall(keyword))
    wanted = _forms(keyword)
    for start in range(len(words)):
        compound = ""
        for word in words[start:]:
            compound += word
            if wanted & _forms(compound):
                return start
            if len(compound) > len(keyword) + 3:  # longer than any plural of the keyword
                break
    return None


def _forms(word: str) -> set[str]:
    """``word`` in lower case, and what its singular can be."""
    word = word.lower()
    forms = {word}
    if len(word) > 2 and word.endswith("s") and not word.endswith("ss"):
        forms.add(word[:-1])
    if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        forms.add(word[:-2])
    if word.endswith("ies") and len(word) > 4:
        forms.add(word[:-3] + "y")
    if word.endswith("ves"):
        forms |= {word[:-3] + "f", word[:-3] + "fe"}
    return forms
