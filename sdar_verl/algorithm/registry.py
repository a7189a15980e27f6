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
            raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}") from None

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

    def options(self, name: str) -> dict[str, Any]:
        """The entry's options and their defaults (``inspect.Parameter.empty``: must be given), in their order."""
        parameters = inspect.signature(self.get(name)).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in self.signals}

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        """Compare what a user set with what the entry takes.

        Raises:
            ValueError: unknown name, unknown option, or an option that must be given and is not.
        """
        known = self.options(name)
        unknown = sorted(options.keys() - known.keys())
        if unknown:
            raise ValueError(
                f"{self.kind} {name!r} has no option {', '.join(map(repr, unknown))}; "
                f"known: {', '.join(known) or 'none'}"
            )
        missing = [option for option, default in known.items() if default is inspect.Parameter.empty]
        missing = [option for option in missing if option not in options]
        if missing:
            raise ValueError(f"{self.kind} {name!r} needs the option {', '.join(map(repr, missing))}")
