"""One skill, and the error of everything that reads them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

MAX_FILE_BYTES = 1_000_000
"""More is a wrong file. How much of a bank a prompt can hold, tokens say: ``sdar.skills.max_tokens``,
``sdar.teacher.max_prompt_length``."""


class SkillBankError(ValueError):
    """A bank or files of it that cannot be used; the message names each with its remedy, one a line.

    Args:
        *faults: one text each.
    """

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))

    @property
    def faults(self) -> list[str]:
        """One text each."""
        return str(self).split("\n")


@contextlib.contextmanager
def collecting(faults: list[str]) -> Iterator[None]:
    """Add the faults of a SkillBankError to ``faults`` instead of raising it: a bank is told all of them at once."""
    try:
        yield
    except SkillBankError as error:
        faults.extend(error.faults)


@dataclass(frozen=True)
class Skill:
    """One piece of privileged context.

    Attributes:
        name: unique within its bank.
        description: one line for people who list the bank.
        text: what goes into the teacher's prompt.
        task_types: categories of the environment that it is for.
        keywords: words or CamelCase names in a task description that call for it.
    """

    name: str
    description: str
    text: str
    task_types: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()

    @property
    def general(self) -> bool:
        """True for a skill that applies to every task: it has neither task types nor keywords."""
        return not self.task_types and not self.keywords

    def __post_init__(self) -> None:
        try:
            "".join((self.name, self.description, self.text, *self.task_types, *self.keywords)).encode()
        except UnicodeEncodeError as error:
            raise SkillBankError(f"skill {self.name!a}: half of a surrogate pair is no text ({error})") from error


def skills_to_json(skills: Iterable[Skill]) -> str:
    """For columns and checkpoints; in order of names."""
    return json.dumps([asdict(skill) for skill in sorted(skills, key=lambda skill: skill.name)])


def skills_from_json(text: str) -> list[Skill]:
    """What :func:`skills_to_json` made."""
    return [
        Skill(**{**fields, "task_types": tuple(fields["task_types"]), "keywords": tuple(fields["keywords"])})
        for fields in json.loads(text)
    ]
