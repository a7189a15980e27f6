"""What an environment answers is checked here, field by field: its author is told what is wrong, and the right form."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from numbers import Real
from typing import Any

from sdar_verl.untrusted import shorten, whole_characters

FREE_PART = re.compile(r"<\w+>")
"""The free part of an action form: ``search[<query>]``."""

_LARGEST = 3.0e38
"""Rewards become float32."""

_ROUNDING = 1e-6

_RIGHT = "Return Step(observation, reward=0.0, done=False, success=False, admissible_actions=())"


class StepError(TypeError, ValueError):
    """An environment answered with something that is no Step, or with a field that its Step cannot hold.

    This is its author's to mend, never the bad luck of an episode.
    """


def text_of(field: str, value: Any) -> str:
    """``value`` as text whose halves of surrogate pairs became U+FFFD."""
    if not isinstance(value, str):
        raise StepError(f"a step's {field} must be text, not {shorten(value)}")
    return whole_characters(str.__str__(value))  # an Enum's own str() is its name


def texts_of(field: str, value: Any) -> tuple[str, ...]:
    """``value`` as a tuple of texts. A set is refused: its order differs between processes."""
    texts = None
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Set):
        with suppress(Exception):  # an array without dimensions, or whatever an author's iterator raises
            texts = tuple(value)
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise StepError(f"a step's {field} must be a tuple of texts, () for none, not {shorten(value)}")
    if any(not text.strip() for text in texts):
        raise StepError(f"a step's {field} holds an empty text, which no answer can name: {shorten(value)}")
    return tuple(text_of(field, text) for text in texts)


def forms_of(field: str, value: Any) -> tuple[str, ...]:
    """``value`` as a tuple of action forms."""
    forms = texts_of(field, value)
    for form in forms:
        if len(FREE_PART.findall(form)) != 1:
            raise StepError(
                f"a step's {field} holds {shorten(form)}; a form has one free part, in angle brackets, such as "
                "'search[<query>]'. An action without one belongs into admissible_actions"
            )
    return forms


def number_of(field: str, value: Any) -> float:
    """``value`` as a finite float; numbers of numpy and torch without dimensions are numbers, too."""
    plain = _plain(value)
    if not isinstance(plain, Real):
        raise StepError(f"a step's {field} must be a number, not {shorten(value)}")
    number: Any = plain
    if not abs(number) <= _LARGEST:  # NaN is not, either
        raise StepError(f"a step's {field} is {shorten(number)}; it must be a finite number, which float32 can hold")
    return float(number)


def success_reward_of(env: str, value: Any) -> float:
    """The option ``success_reward`` of an environment. ValueError when it is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise ValueError(f"{env} option success_reward={value!r}: give a number above 0")
    return float(value)


def share_of(field: str, value: Any) -> float | None:
    """``value`` as a float from 0 to 1; None stays None."""
    if value is None:
        return None
    number = number_of(field, value)
    if not -_ROUNDING <= number <= 1 + _ROUNDING:
        raise StepError(f"a step's {field} is {shorten(number)}; it must be None, or a number from 0 to 1")
    return min(max(number, 0.0), 1.0)


def flag_of(field: str, value: Any) -> bool:
    """``value`` as a bool; 0 and 1 are taken, other numbers and texts ("false" would be true) are not."""
    flag = _plain(value)
    if not isinstance(flag, Real) or flag not in (0, 1):
        raise StepError(f"a step's {field} must be True or False, not {shorten(value)}")
    return bool(flag)


def mapping_of(field: str, value: Any) -> Mapping[str, Any]:
    """``value``, which must be a mapping."""
    if not isinstance(value, Mapping):
        raise StepError(f"a step's {field} must be a dict, {{}} for nothing, not {shorten(value)}")
    return value


def not_a_step(value: Any) -> StepError:
    """The error for an answer that is no Step at all."""
    if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
        hint = "; the method must be a plain function: neither async nor with yield"
        if inspect.iscoroutine(value):
            value.close()  # else Python warns that nobody awaited it
    elif isinstance(value, tuple):
        hint = "; a tuple as gym's environments return is none"
    else:
        hint = ""
    return StepError(f"it returned {shorten(value)}, which is no sdar_verl.envs.base.Step{hint}. {_RIGHT}")


def not_its_fields(error: TypeError) -> StepError | None:
    """The error for a call ``Step(...)`` with other fields than it has; None for a TypeError of something else."""
    return StepError(f"{error}. {_RIGHT}") if str(error).startswith("Step.__init__()") else None


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's own; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
