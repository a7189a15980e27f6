"""One skill, and the error of everything that reads them."""

from __future__ import annotations

from dataclasses import dataclass

# A skill lies in every teacher prompt: more than this (about 5,000 tokens) is a wrong file, not a skill.
MAX_FILE_BYTES = 20_000


class SkillBankError(ValueError):
    """A bank or one of its files that cannot be used; the message names the file and the remedy."""


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
