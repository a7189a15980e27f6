"""Options that are a function's keyword-only arguments: their values are what its annotations say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError


def check_values(function: Callable[..., Any], options: Mapping[str, Any], node: str, fault: type[Exception]) -> None:
    """``fault`` for a value that the annotation of its option does not allow.

    Args:
        function: its keyword-only arguments are the options; those without an annotation may be anything.
        options: option -> value.
        node: where the options stand, for the message.
        fault: raised.
    """
    for option, kind in _kinds(function).items():
        if option not in options:
            continue
        value = options[option]
        try:
            # "3" is no number; a list may stand for a tuple.
            kind.validate_python(value, strict=not isinstance(value, list | dict))
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise fault(f"{node}.{option}={value!r}: {said[0].lower()}{said[1:]}") from None


@cache
def _kinds(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """Options that are annotated, and what they may be."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception:  # a third party's annotation may name what is imported for type checkers alone
        return {}
    kinds = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name in hints:
            with suppress(PydanticUserError):  # a class of a third party's
                kinds[parameter.name] = TypeAdapter(hints[parameter.name])
    return kinds
