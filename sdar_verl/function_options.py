"""Options of registered functions: the keyword-only arguments of one, the fields of a class.

Compared with what a user set before a run starts: names, what must be given, and types where they are annotated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError


def own_options(function: Callable[..., Any], offered: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """Option -> parameter, in their order.

    Args:
        function: registered; a class has its fields.
        offered: keyword arguments that the caller gives to every entry; no options.
    """
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in offered]
    fields = isinstance(function, type)
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY or (fields and p.kind is p.POSITIONAL_OR_KEYWORD)}


def check_function_options(
    what: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    offered: Collection[str] = (),
    node: str | None = None,
) -> None:
    """Compare what a user set with what ``function`` takes.

    Args:
        what: kind and name of the entry, for messages.
        function, offered: see :func:`own_options`.
        options: as set.
        node: of the configuration that holds them, for messages.

    Raises:
        ValueError: an unknown option, one that must be given and is not, a value of another type than the annotation;
            or an argument that looks like a misspelled one of ``offered``.
    """
    known = own_options(function, offered)
    for name, parameter in known.items():
        if offered and parameter.default is None and parameter.annotation is parameter.empty:
            raise ValueError(
                f"{what} takes {name}=None, which nobody gives it: it is offered {', '.join(sorted(offered))}. An "
                "option whose default is None needs an annotation"
            )
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise ValueError(f"{what} has no option {', '.join(map(repr, unknown))}; known: {', '.join(known) or 'none'}")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in options]
    if missing:
        needed = f"+{node}.{missing[0]}=..." if node else f"the option {', '.join(map(repr, missing))}"
        raise ValueError(f"{what} needs {needed}")
    kinds = _kinds(function)
    for name, value in options.items():
        try:
            # "3" is no number; a list may stand for a tuple.
            if name in kinds:
                kinds[name].validate_python(value, strict=not isinstance(value, list | dict))
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            where = f"{node}.{name}={value!r}" if node else f"{what} has {name}={value!r}"
            raise ValueError(f"{where}: {said[0].lower()}{said[1:]}") from None


@cache
def _kinds(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """Arguments that are annotated, and what they may be."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception:  # a third party's annotation may name what is imported for type checkers alone
        return {}
    kinds = {}
    for name in own_options(function):
        if name in hints:
            with suppress(PydanticUserError):  # a class of a third party's
                kinds[name] = TypeAdapter(hints[name])
    return kinds
