"""What runs inside one environment process: a few environments, stepped one at a time.

Imports neither verl nor torch, so that the process starts fast.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sdar_verl.envs.base import Step, Task, TextEnv
from sdar_verl.envs.fields import StepError, not_a_step, not_its_fields
from sdar_verl.envs.registry import make_env


@dataclass(frozen=True)
class Timed:
    """A step and the seconds that the environment took for it."""

    step: Step
    seconds: float


@dataclass(frozen=True)
class Started:
    """What a process says when it is ready.

    Attributes:
        pid: its process id.
        thread_safe: whether its environments may be stepped at the same time (:attr:`TextEnv.thread_safe`).
    """

    pid: int
    thread_safe: bool


class EnvRaised(Exception):
    """What an environment raised, in plain text: exceptions of its own need not survive the way to another process, and
    a TimeoutError of its own is not one of the pool's.

    Args:
        text: type and message.
        authors: the environment's author must mend it (:class:`StepError`).
    """

    def __init__(self, text: str, authors: bool) -> None:
        super().__init__(text, authors)
        self.text, self.authors = text, authors


def checked(answer: Any) -> Step:
    """``answer`` of an environment, which must be a Step; the Step has checked its own fields.

    Raises:
        StepError: it is none.
    """
    if not isinstance(answer, Step):
        raise not_a_step(answer)
    if type(answer) is Step:
        return answer
    # A subclass may not have checked its fields, and its module need not be there where the answer goes.
    return Step(**{field.name: getattr(answer, field.name) for field in fields(Step)})


def check_beginning(step: Step) -> None:
    """Refuse what nobody would look at: the policy has not acted yet.

    Raises:
        StepError: ``reset`` has ended the episode, or pays for it.
    """
    given = {name: getattr(step, name) for name in ("done", "success", "reward", "score") if getattr(step, name)}
    if given:
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        raise StepError(f"reset returned {told}: an episode begins without; give it with the step that earns it")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as raised:
        error = (isinstance(raised, TypeError) and not_its_fields(raised)) or raised
        text = str(error) if isinstance(error, StepError) else f"{type(error).__name__}: {error}"
        raise EnvRaised(" ".join(text.split())[:800], isinstance(error, StepError)) from raised


class EnvHost:
    """Environments of one process, by slot; made when a slot is first used, and used again for later episodes.

    Calls for different slots may come from different threads when the environment is thread-safe; calls for one slot
    follow each other.

    Args:
        env_name: registered name.
        env_options: keyword arguments of the environment.
        env_modules: modules imported first; they register environments of other packages.
    """

    def __init__(self, env_name: str, env_options: Mapping[str, Any], env_modules: Sequence[str]) -> None:
        self._name = env_name
        self._options = dict(env_options)
        self._modules = tuple(env_modules)
        self._envs: dict[int, TextEnv] = {}

    def start(self) -> Started:
        """Import the modules and make the first environment.

        Raises:
            EnvRaised: the imports or the environment's constructor raised.
        """
        with _told():
            for module in self._modules:
                importlib.import_module(module)
            return Started(os.getpid(), bool(self._env(0).thread_safe))

    def reset(self, slot: int, task: Task) -> Timed:
        """Start ``task`` in the environment of ``slot``; an :class:`EnvRaised` for whatever goes wrong there."""
        return self._timed(slot, "reset", task)

    def step(self, slot: int, action: str) -> Timed:
        """Apply ``action`` in the environment of ``slot``; an :class:`EnvRaised` for whatever goes wrong there."""
        return self._timed(slot, "step", action)

    def _timed(self, slot: int, method: str, argument: Any) -> Timed:
        started = time.perf_counter()
        try:
            with _told():
                step = checked(getattr(self._env(slot), method)(argument))
                if method == "reset":
                    check_beginning(step)
        except BaseException:
            self._drop(slot)  # its state is unknown: the next episode gets a new one
            raise
        return Timed(step, time.perf_counter() - started)

    def close(self) -> None:
        """Close all environments, whatever they raise."""
        for slot in list(self._envs):
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        with contextlib.suppress(Exception, SystemExit):
            if slot in self._envs:
                self._envs.pop(slot).close()

    def _env(self, slot: int) -> TextEnv:
        if slot not in self._envs:
            self._envs[slot] = make_env(self._name, **self._options)
        return self._envs[slot]
