"""A named table of functions, for gates and objectives; a third party adds its own without touching this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

F = TypeVar("F", bound=Callable[..., object])


class Registry(Generic[F]):
    """Functions by name.

    Args:
        kind: what the entries are called in error messages, e.g. ``"gate"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, F] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that enters a function under ``name``.

        Raises:
            ValueError: the name is taken by another function. The same function registered again (a module imported
                twice, under one name) replaces itself.
        """

        def enter(function: F) -> F:
            known = self._entries.get(name)
            if known is not None and _origin(known) != _origin(function):
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by {'.'.join(_origin(known))}; choose another name"
                )
            self._entries[name] = function
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


def _origin(function: Callable[..., object]) -> tuple[str, str]:
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(function))
