"""Which skills of a bank the teacher sees for a task: registered rules, one or several in order, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdar_verl.envs.base import Task
from sdar_verl.skills import rules as _rules  # noqa: F401  registers its rules
from sdar_verl.skills import similarity as _similarity  # noqa: F401  registers its rule
from sdar_verl.skills.bank import Skill, SkillBank
from sdar_verl.skills.registry import (
    EVIDENCE,
    RetrievalError,
    check_rules,
    get_rule,
    register_retriever,
    retriever_names,
)
from sdar_verl.skills.ucb import Evidence

__all__ = [
    "Retrieval",
    "RetrievalError",
    "check_rules",
    "fit_budget",
    "register_retriever",
    "render_skills",
    "retrieve",
    "retriever_names",
]


@dataclass(frozen=True)
class Retrieval:
    """What was found for one task.

    Attributes:
        skills: the specific skills first, in the order of the rules, then the general ones; no duplicates.
        no_match: skills were asked for, but none is specific to the task; to be counted.
        dropped: skills that were found and did not fit the budget, best first; to be counted.
    """

    skills: tuple[Skill, ...]
    no_match: bool
    dropped: tuple[Skill, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the skills, in order."""
        return tuple(skill.name for skill in self.skills)


def asked_in(task: Task, column: str | None) -> Task:
    """``task`` with what a column of its data says as its description (``sdar.skills.column``), however little.

    Raises:
        RetrievalError: the column holds objects.
    """
    if column is None:
        return task
    value = task.at(column)
    if isinstance(value, Mapping):
        raise RetrievalError(
            f"sdar.skills.column={column} holds an object with {', '.join(map(str, value))}, not a text; name one of "
            "these, with a dot"
        )
    words = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return replace(task, description="\n".join(map(str, words)))


def retrieve(
    bank: SkillBank,
    task: Task,
    rules: str | Sequence[str],
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    evidence: Evidence | None = None,
) -> Retrieval:
    """Skills of ``bank`` for ``task``.

    Args:
        bank: where to look.
        task: its description, type and id are read.
        rules: a rule's name, or several: their results follow each other, without duplicates.
        seed: for rules that draw; the same task gets the same skills under the same seed.
        options: rule -> its keyword arguments.
        evidence: rewards of earlier steps, for rules that learn.
    Raises:
        RetrievalError: see :func:`check_rules`; or a rule fails, or gives something else than skills.
    """
    names = check_rules(rules, options)
    given = options or {}
    found = [skill for name in names for skill in _apply(name, bank, task, seed, given.get(name, {}), evidence)]
    unique = list({skill.name: skill for skill in found}.values())
    specific = [skill for skill in unique if not skill.general]
    general = [skill for skill in unique if skill.general]
    return Retrieval(skills=(*specific, *general), no_match=names != ["none"] and not specific)


def _apply(
    name: str, bank: SkillBank, task: Task, seed: int, options: Mapping[str, Any], evidence: Evidence | None
) -> list[Skill]:
    rule = get_rule(name)
    known = {EVIDENCE: evidence} if rule.learns else {}
    try:
        found = list(rule.function(bank, task, seed, **options, **known))
    except RetrievalError:
        raise
    except Exception as error:  # a third party's rule can fail in any way Python can
        raise RetrievalError(
            f"retrieval rule {name!r} failed on task {task.task_id!r}: {type(error).__name__}: {error}"
        ) from error
    if strangers := [item for item in found if not isinstance(item, Skill)]:
        raise RetrievalError(f"retrieval rule {name!r} gave {type(strangers[0]).__name__}; it must give skills")
    return found


def fit_budget(found: Retrieval, max_tokens: int, count_tokens: Callable[[str], int]) -> Retrieval:
    """The first skills of ``found`` that fit together, whole ones only; the others are dropped.

    Args:
        found: in the order of what matters most.
        max_tokens: for the text of all skills.
        count_tokens: of the policy's tokenizer.
    Raises:
        RetrievalError: not even the first fits, so that the teacher would be left without.
    """
    kept: tuple[Skill, ...] = ()
    for skill in found.skills:
        tokens = count_tokens(render_skills([*kept, skill]))
        if tokens > max_tokens:
            if not kept:
                raise RetrievalError(
                    f"sdar.skills.max_tokens={max_tokens} is less than the {tokens} tokens of skill {skill.name!r} "
                    "alone; raise it, or shorten the skill"
                )
            break
        kept = (*kept, skill)
    return replace(found, skills=kept, dropped=found.skills[len(kept) :])


def render_skills(skills: Iterable[Skill]) -> str:
    """Text for the prompt's skill slot; empty without skills."""
    return "\n\n".join(skill.text for skill in skills)
