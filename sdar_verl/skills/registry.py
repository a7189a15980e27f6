"""Retrieval rules by name; a third party adds its own with one decorator, from a module in ``sdar.modules``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sdar_verl.errors import origin, require_free, require_name
from sdar_verl.function_options import check_function_options
from sdar_verl.skills.skill import Skill

Function = TypeVar("Function", bound=Callable[..., list[Skill]])

EVIDENCE = "evidence"
"""Keyword argument through which a rule that learns gets what is known; not an option."""


class RetrievalError(ValueError):
    """A fault of the set-up: an unknown or failing rule, an option without effect, a budget that nothing fits."""


@dataclass(frozen=True)
class Rule:
    """A registered retrieval rule.

    Attributes:
        name: as in ``sdar.skills.retrieval``.
        function: ``(bank, task, seed, **options) -> skills``.
    """

    name: str
    function: Callable[..., list[Skill]]

    @property
    def learns(self) -> bool:
        """Whether it reads rewards of earlier steps."""
        return EVIDENCE in inspect.signature(self.function).parameters


_rules: dict[str, Rule] = {}


def register_retriever(name: str) -> Callable[[Function], Function]:
    """Decorator that makes a rule available under ``name``.

    The function takes a bank, a task and a seed, and as keyword-only arguments with defaults what shall be settable
    under ``sdar.skills.options.<name>``. It gives skills, best first: of the bank, or of its own making. A keyword-only
    argument called ``evidence`` gets the rewards of earlier steps (``sdar_verl/skills/ucb.py``).

    Raises:
        RetrievalError: the name is taken by another function. The same one registered again replaces itself.
        TypeError: ``name`` is no text.
    """
    require_name("register_retriever", name)

    def enter(function: Function) -> Function:
        known = _rules.get(name)
        require_free(
            "retrieval rule", name, None if known is None else origin(known.function), function, RetrievalError
        )
        _rules[name] = Rule(name, function)
        return function

    return enter


def retriever_names() -> list[str]:
    """Names of the registered rules."""
    return sorted(_rules)


def get_rule(name: str) -> Rule:
    """The rule called ``name``.

    Raises:
        RetrievalError: unknown; lists the known ones.
    """
    if name not in _rules:
        raise RetrievalError(f"unknown retrieval rules {[name]}; use some of {retriever_names()}")
    return _rules[name]


def check_rules(rules: str | Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """``rules`` as a list of registered names.

    Args:
        rules: a name, or several.
        options: rule -> its keyword arguments (``sdar.skills.options``).
    Raises:
        RetrievalError: an unknown rule, or none at all; `none` among others, which would have no effect; an option
            that its rule does not have, or of a rule that is not used; a value that its annotation does not allow.
    """
    names = [rules] if isinstance(rules, str) else list(rules)
    unknown = [name for name in names if name not in _rules]
    if unknown or not names:
        raise RetrievalError(f"unknown retrieval rules {unknown or names}; use some of {retriever_names()}")
    if "none" in names and len(names) > 1:
        raise RetrievalError(f"retrieval rules {names}: 'none' has no effect beside others; leave it out or alone")
    for name, given in (options or {}).items():
        if name not in names:
            raise RetrievalError(
                f"sdar.skills.options.{name} has no effect: sdar.skills.retrieval={names} does not name that rule"
            )
        node, rule = f"sdar.skills.options.{name}", get_rule(name).function
        try:
            check_function_options(f"retrieval rule {name!r}", rule, given, offered=[EVIDENCE], node=node)
        except ValueError as error:
            raise RetrievalError(str(error)) from None
    return names
