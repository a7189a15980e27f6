"""The small protocol that every text environment speaks: a task goes in, text and admissible actions come out."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sdar_verl.envs.fields import flag_of, forms_of, mapping_of, number_of, share_of, text_of, texts_of
from sdar_verl.untrusted import shorten, whole_characters

DEFAULT_ACTION_TAGS = ("action",)
"""An answer carries its action between ``<action>`` and ``</action>``, unless the environment says otherwise."""

TAG_NAME = re.compile(r"[a-z][a-z0-9_-]*")
"""Names of action tags: tags are read whatever their case, their names are handed on in lower case."""

NO_ACTION = "none"
"""Sent to the environment, which does not know it, where an answer held no action."""


RECIPE = "recipe"
"""Stands as the environment of a task that is a row of another recipe's data."""


@dataclass(frozen=True)
class Task:
    """One thing to do, as a task panel stores it. Halves of surrogate pairs in its texts become U+FFFD.

    Attributes:
        env: registered name of the environment, e.g. ``alfworld``.
        task_id: stable name, unique within a panel and independent of where files lie.
        task_type: the environment's own category; metrics are reported per type.
        description: what is asked, in the environment's words; skill retrieval reads this and nothing else.
        data: what the environment needs to start the task; JSON-serialisable.
    """

    env: str
    task_id: str
    task_type: str
    description: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("env", "task_id", "task_type", "description"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise TypeError(f"a task's {name} must be text, not {shorten(text)}")
            object.__setattr__(self, name, whole_characters(text))
        if not isinstance(self.data, Mapping):
            raise TypeError(f"the data of task {shorten(self.task_id)} must be an object, not {shorten(self.data)}")

    def at(self, path: str) -> Any:
        """What the data hold at a path with dots into it, such as ``extra_info.topic``; None where there is nothing."""
        value: Any = self.data
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Step:
    """What the environment answers to a reset or an action. Halves of surrogate pairs in its texts become U+FFFD, since
    neither a tokenizer nor a trace takes them; numbers of numpy and torch become Python's.

    Attributes:
        observation: text shown to the agent.
        reward: reward of this step (0 unless the environment says otherwise).
        done: True when the episode is over for the environment's own reasons.
        success: True when the task is solved.
        admissible_actions: actions that the environment accepts now, in a stable order; empty when it cannot tell.
        action_forms: further actions that it accepts, with one free part in angle brackets: ``search[<query>]``.
        score: how well the task was done, 0 to 1, where the environment grades it; None: success is all there is.
        info: anything else worth logging; it must be picklable.

    Raises:
        StepError: (a TypeError and a ValueError) a field is of another kind, or a number is NaN, infinite or out of its
            range: it would spoil the advantages of its whole group.
    """

    observation: str
    reward: float = 0.0
    done: bool = False
    success: bool = False
    admissible_actions: tuple[str, ...] = ()
    action_forms: tuple[str, ...] = ()
    score: float | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, plain in _FIELDS.items():
            object.__setattr__(self, name, plain(name, getattr(self, name)))


_FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    "observation": text_of,
    "reward": number_of,
    "done": flag_of,
    "success": flag_of,
    "admissible_actions": texts_of,
    "action_forms": forms_of,
    "score": share_of,
    "info": mapping_of,
}


class TextEnv(ABC):
    """One running episode at a time; reset starts the next."""

    action_tags: ClassVar[tuple[str, ...]] = DEFAULT_ACTION_TAGS
    """Tags that enclose an action. With one, ``step`` gets what stands between them; with several, ``tag: content``.
    The prompt template must declare the same ones."""

    thread_safe: ClassVar[bool] = False
    """True when *different* environments of one process may be stepped at the same time, from different threads: for
    those that wait for a server most of the time."""

    task_types: ClassVar[tuple[str, ...]] = ()
    """Its categories of tasks; empty when they depend on the data. A skill bank that names others is refused."""

    task_type_aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """What skill banks of others call them."""

    @property
    def longest_step_s(self) -> float:
        """Seconds that a step or a reset may take by the environment's own time limits (0: it has none); those of the
        pool, ``sdar.env.step_timeout_s`` and ``sdar.env.reset_timeout_s``, must be longer."""
        return 0.0

    def check(self) -> None:  # noqa: B027  few environments need it
        """Raise ValueError when what the options point to is not there: called once, before training starts."""

    def check_tasks(self, tasks: Sequence[Task]) -> None:  # noqa: B027  nor this
        """Raise ValueError when tasks do not fit the options: called with each panel of a run, before training."""

    @abstractmethod
    def reset(self, task: Task) -> Step:
        """Start ``task`` and return the first observation."""

    @abstractmethod
    def step(self, action: str) -> Step:
        """Apply ``action``, in the form that :attr:`action_tags` says; one that the environment does not understand is
        its own no-op, never an exception."""

    @classmethod
    def demonstration(cls, task: Task) -> Sequence[str]:
        """Actions that solve ``task``, for a teacher that may see them; empty when the environment knows none.

        Called without an episode, in the agent loop's process: read a file, do not play.
        """
        return ()

    def close(self) -> None:  # noqa: B027  environments without resources need not override it
        """Release what the episode holds."""
