"""Privileged contexts by name; a third party adds its own with one decorator, from a module in ``sdar.modules``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sdar_verl.context.base import ContextRequest, Passage
from sdar_verl.errors import SdarError, origin, require_free, require_name
from sdar_verl.function_options import check_function_options

ContextFunction = TypeVar("ContextFunction", bound=Callable[..., "Passage | str | Generator[Any, Any, Any] | None"])


class ContextError(SdarError):
    """A context is unknown, wrongly set, or cannot be made from these tasks: a fault of the set-up."""


@dataclass(frozen=True)
class Context:
    """A registered context.

    Attributes:
        name: as in ``sdar.context.sources``.
        function: ``(request, **options) -> Passage, text, or None`` (there is none for this row); a generator of that
            where it asks a writer.
        late: it reads finished episodes, so it can only be made when the whole group has ended.
        by_turn: it differs by the turn of the episode (and is late).
        of_group: it is made of other episodes of the same prompt (and is late): a group of one has none.
        writes: it asks the run's writer (and is late).
    """

    name: str
    function: Callable[..., Any]
    late: bool
    by_turn: bool = False
    of_group: bool = False
    writes: bool = False

    def make(self, request: ContextRequest, options: Mapping[str, Any]) -> Passage:
        """The passage for ``request``; with an empty text when there is none.

        Raises:
            ContextError: the function fails, or gives something else than text.
        """
        with self.named_faults():
            return self.passage(self.function(request, **options))

    @contextmanager
    def named_faults(self) -> Iterator[None]:
        """Around a third party's function, which can fail in any way Python can: a :class:`ContextError` comes out."""
        try:
            yield
        except ContextError:
            raise
        except Exception as error:
            raise ContextError(f"context {self.name!r}: {type(error).__name__}: {error}") from error

    def passage(self, made: Any) -> Passage:
        """What a function gave, as a passage. TypeError when it is none."""
        passage = Passage(made or "") if made is None or isinstance(made, str) else made
        if not isinstance(passage, Passage):
            raise TypeError(f"it gave {type(made).__name__}; it must give text, Passage or None")
        return passage if passage.text.strip() else replace(passage, text="")


_contexts: dict[str, Context] = {}


def register_context(
    name: str, *, late: bool = False, by_turn: bool = False, of_group: bool = False
) -> Callable[[ContextFunction], ContextFunction]:
    """Decorator that enters a context function under ``name``.

    The function takes a :class:`~sdar_verl.context.base.ContextRequest`, and as keyword-only arguments what shall be
    settable under ``sdar.context.options.<name>`` (without a default: must be set); those with an annotation are
    checked before the run starts. It gives the teacher's text (or a ``Passage``), None when there is none for this row,
    and raises :class:`ContextError` when the set-up is at fault.

    One that needs somebody to write is a generator: it yields a :class:`~sdar_verl.context.prompt.Prompt` (or a list of
    them), is sent the answer of ``sdar.context.writer`` (or their list), None where there is none, may yield again, and
    returns what other functions return. It is late. Answers that it cannot read it tells by
    :class:`~sdar_verl.context.prompt.UnreadableAnswer`.

    Args:
        name: of the context.
        late: the function reads ``request.episode``.
        by_turn: it reads ``request.turn``, too: each turn of an episode has a context of its own.
        of_group: it reads ``request.siblings``, and has nothing to say where there are none.

    Raises:
        ContextError: the name is taken by another function. The same one registered again replaces itself.
        TypeError: ``name`` is no text.
    """
    require_name("register_context", name)

    def enter(function: ContextFunction) -> ContextFunction:
        known = _contexts.get(name)
        require_free("context", name, None if known is None else origin(known.function), function, ContextError)
        writes = inspect.isgeneratorfunction(function)
        late_one = late or by_turn or of_group or writes
        _contexts[name] = Context(name, function, late_one, by_turn, of_group, writes)
        return function

    return enter


def context_names() -> list[str]:
    """Names of the registered contexts, sorted."""
    return sorted(_contexts)


def get_context(name: str) -> Context:
    """The context called ``name``.

    Raises:
        ContextError: unknown; lists the known ones.
    """
    if name not in _contexts:
        raise ContextError(
            f"unknown context {name!r}; known: {', '.join(context_names())}. A context of another package must be "
            "imported first: name its module in sdar.modules"
        )
    return _contexts[name]


def check_contexts(
    sources: Sequence[str], options: Mapping[str, Mapping[str, Any]], node: str = "sdar.context"
) -> None:
    """Raise a :class:`ContextError` for an unknown or doubled source, for options that nobody takes, or that lack.

    Args:
        sources, options: of a node.
        node: its name, for messages.
    """
    doubled = sorted({name for name in sources if list(sources).count(name) > 1})
    if doubled:
        raise ContextError(f"{', '.join(doubled)} named twice; each context is shown once")
    for name in sources:
        _check_options(get_context(name), options.get(name, {}), node)
    unused = sorted(set(options) - set(sources))
    if unused:
        raise ContextError(
            f"{node}.options.{unused[0]} has no effect: {node}.sources={list(sources)} does not name it; leave it out "
            f"(~{node}.options.{unused[0]} on the command line, where a preset sets it)"
        )


def _check_options(context: Context, options: Mapping[str, Any], node: str) -> None:
    try:
        check_function_options(
            f"context {context.name!r}", context.function, options, node=f"{node}.options.{context.name}"
        )
    except ValueError as error:
        raise ContextError(str(error)) from None
