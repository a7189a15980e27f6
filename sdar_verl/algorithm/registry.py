"""A named table of functions, for gates, objectives and the like; a third party adds its own without touching this
package.

What an entry reads it says in its signature. Keyword arguments that the caller offers to every entry are *signals*
(a gate's ``beta`` and ``entropy``); an entry names those it reads and takes the rest as ``**_``. Any other keyword
argument is an *option* of that entry, which the user sets in the entry's ``..._options``; one without a default must
be given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from sdar_verl.errors import origin, require_free, require_name
from sdar_verl.function_options import check_function_options

F = TypeVar("F", bound=Callable[..., object])


class Registry(Generic[F]):
    """Functions by name.

    Args:
        kind: what the entries are called in error messages, e.g. ``"gate"``.
        signals: keyword arguments that the caller offers to every entry.
    """

    def __init__(self, kind: str, signals: Iterable[str] = ()) -> None:
        self.kind = kind
        self.signals = frozenset(signals)
        self._entries: dict[str, F] = {}
        self._facts: dict[str, Mapping[str, Any]] = {}

    def register(self, name: str, **facts: Any) -> Callable[[F], F]:
        """Decorator that enters a function under ``name``, with what else is to be known of it (:meth:`fact`).

        Raises:
            ValueError: the name is taken by another function. The same function registered again (a module imported
                twice, under one name) replaces itself.
            TypeError: ``name`` is no text.
        """
        require_name(f"register_{self.kind.split()[-1]}", name)

        def enter(function: F) -> F:
            known = self._entries.get(name)
            require_free(self.kind, name, None if known is None else origin(known), function)
            self._entries[name] = function
            self._facts[name] = facts
            return function

        return enter

    def get(self, name: str) -> F:
        """The function registered under ``name``.

        Raises:
            ValueError: unknown name; the message lists the known ones.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise ValueError(
                f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}. One of another package must be "
                "imported first: name its module in sdar.modules"
            ) from None

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)

    def fact(self, name: str, key: str, default: Any = None) -> Any:
        """What ``name`` was registered with under ``key``; ValueError when the name is unknown."""
        self.get(name)
        return self._facts.get(name, {}).get(key, default)

    def reads(self, name: str, signal: str) -> bool:
        """Whether the entry names ``signal`` in its signature; ValueError when the name is unknown."""
        return signal in inspect.signature(self.get(name)).parameters

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        """See :func:`~sdar_verl.function_options.check_function_options`; ValueError, too, when the name is unknown."""
        check_function_options(f"{self.kind} {name!r}", self.get(name), options, offered=self.signals)
