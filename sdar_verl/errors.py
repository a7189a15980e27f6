"""Errors that a user can mend: the message names the option, the value and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class SdarError(RuntimeError):
    """Base of the errors this package raises on purpose."""


class ConfigError(SdarError):
    """An option is unknown, out of range, or without effect in the chosen mode."""


class TeacherError(SdarError):
    """The privileged teacher cannot do its work: it does not see its context, or its numbers are not to be trusted."""


class RolloutError(SdarError):
    """Episodes cannot be played as configured: a prompt does not fit, a task does not exist, an environment refuses."""


class ProcessDiedError(SdarError):
    """A process without which the run cannot go on is dead."""


class NonFiniteError(SdarError):
    """Rows of a step hold NaN or infinity where a number is needed."""


def require_name(decorator: str, name: Any) -> None:
    """TypeError unless a registering decorator got a name: ``@decorator`` alone gets what it decorates."""
    if not isinstance(name, str) or not name:
        given = getattr(name, "__name__", repr(name))
        raise TypeError(f'@{decorator} needs a name, and got {given}: write @{decorator}("a_name")')


def origin(function: Callable[..., Any]) -> str:
    """Module and name; a module that is imported twice under one name makes two functions of one origin."""
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"


def require_free(
    kind: str, name: str, owner: str | None, new: Callable[..., Any], error: type[Exception] = ValueError
) -> None:
    """``error`` if ``name`` is taken by another origin than ``new``'s; the same one replaces itself."""
    if owner is not None and owner != origin(new):
        raise error(f"{kind} {name!r} is already registered by {owner}; choose another name")
