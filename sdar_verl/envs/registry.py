"""Environments by name; a third party adds its own with one decorator, without touching this package."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from numbers import Real
from typing import Any, TypeVar

from sdar_verl.envs.base import RECIPE, TAG_NAME, Task, TextEnv
from sdar_verl.envs.fields import StepError, texts_of
from sdar_verl.errors import origin, require_free, require_name
from sdar_verl.untrusted import shorten

Factory = TypeVar("Factory", bound=Callable[..., TextEnv])


@dataclass(frozen=True)
class _Builtin:
    """An environment of this package: imported when it is first asked for.

    Attributes:
        module: registers the environment when imported.
        extra: pip extra that brings what it needs.
        requires: top-level modules of that extra.
    """

    module: str
    extra: str
    requires: tuple[str, ...]


_BUILTINS = {
    "alfworld": _Builtin("sdar_verl.envs.alfworld.env", "alfworld", ("alfworld", "textworld")),
    "search": _Builtin("sdar_verl.envs.search.env", "search", ("bm25s", "icu4py", "regex", "urllib3")),
    "webshop": _Builtin("sdar_verl.envs.webshop.env", "webshop", ("bm25s", "rapidfuzz", "Stemmer")),
}
_PACKAGES = {"Stemmer": "PyStemmer"}
"""Module -> package, where that is called otherwise."""
_registered: dict[str, Callable[..., TextEnv]] = {}


def register_env(name: str) -> Callable[[Factory], Factory]:
    """Decorator that enters an environment class (or a function that makes one) under ``name``.

    Its keyword arguments become the environment's options. Constructing it must be cheap and hold no resources:
    settings are checked by constructing one before training starts. What is heavy belongs into the first reset.

    Raises:
        ValueError: the name is taken by another class. The same class registered again (a module imported twice, under
            one name) replaces itself.
        TypeError: ``name`` is no text.
    """
    require_name("register_env", name)

    def enter(factory: Factory) -> Factory:
        known = _registered.get(name)
        owner = known and origin(known)
        if owner is None and name in _BUILTINS and factory.__module__ != _BUILTINS[name].module:
            owner = _BUILTINS[name].module
        require_free("environment", name, owner, factory)
        _registered[name] = factory
        return factory

    return enter


def known_envs() -> tuple[str, ...]:
    """Names that :func:`make_env` takes, sorted."""
    return tuple(sorted(_BUILTINS.keys() | _registered.keys()))


def make_env(name: str, /, **options: Any) -> TextEnv:
    """Construct the environment called ``name``.

    Args:
        name: see :func:`known_envs`.
        **options: keyword arguments of the environment.

    Raises:
        ValueError: unknown name, unknown option, a value that the environment refuses, or something that is no
            :class:`TextEnv`.
        ImportError: the environment needs an extra that is not installed; the message names the pip command.
    """
    factory = _factory(name)
    _check_options(name, factory, options)
    with _authors_faults(name, "cannot be made"):
        env = factory(**options)
        _check_class(name, env)
    return env


def demonstration_of(task: Task) -> list[str]:
    """Actions that solve ``task``, in order; empty when nobody knows any.

    They come from the task's data (key ``demonstration``), else from the environment's ``demonstration``.

    Raises:
        ValueError: unknown environment.
        OSError: a file that the environment needs for it is not there.
    """
    stored = task.data.get("demonstration")
    knows = not stored and task.env != RECIPE
    expert = getattr(_factory(task.env), "demonstration", None) if knows else None
    actions = stored or (expert(task) if expert is not None else None)
    try:
        given = [actions] if isinstance(actions, str) else () if actions is None else actions
        return list(texts_of("demonstration", given))
    except StepError:
        raise ValueError(
            f"environment {task.env!r}, demonstration of task {shorten(task.task_id)}: it must be a list of actions, "
            f"each a text and none empty, not {shorten(actions)}"
        ) from None


def task_types_of(name: str) -> tuple[tuple[str, ...], Mapping[str, tuple[str, ...]]]:
    """The environment's task types and other names for them; both empty where they depend on its data.

    Raises:
        ValueError: unknown environment.
        ImportError: as :func:`make_env`.
    """
    factory = _factory(name)
    return tuple(getattr(factory, "task_types", ())), dict(getattr(factory, "task_type_aliases", {}))


def check_env(name: str, options: dict[str, Any]) -> None:
    """Raise what :func:`make_env` and the environment's own :meth:`TextEnv.check` would, and leave nothing open."""
    env = make_env(name, **options)
    try:
        with _authors_faults(name, "raised in its check"):
            env.check()
    finally:
        with _authors_faults(name, "raised in its close"):
            env.close()


def tasks_fault(name: str, options: dict[str, Any], tasks: Sequence[Task]) -> str | None:
    """What :meth:`TextEnv.check_tasks` has against a panel; None where it has nothing, or where there is no such
    environment to ask (:func:`check_env` says why)."""
    try:
        env = make_env(name, **options)
    except (ValueError, ImportError, OSError):
        return None
    try:
        with _authors_faults(name, "raised in its check_tasks"):
            env.check_tasks(tasks)
    except ValueError as error:
        return str(error)
    finally:
        with _authors_faults(name, "raised in its close"):
            env.close()
    return None


def packages_of_extras() -> dict[str, tuple[str, ...]]:
    """pip extra of each environment of this package -> the packages that it needs."""
    return {
        builtin.extra: tuple(_PACKAGES.get(module, module) for module in builtin.requires)
        for builtin in _BUILTINS.values()
    }


def check_installed(name: str) -> None:
    """Raise ImportError that names the pip command when an environment of this package lacks what it needs."""
    builtin = _BUILTINS[name]
    missing = [module for module in builtin.requires if util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"environment {name!r} needs {', '.join(missing)}, not installed here: "
            f'pip install "sdar-verl[{builtin.extra}]"'
        )


def _factory(name: str) -> Callable[..., TextEnv]:
    if name not in _registered and name in _BUILTINS:
        builtin = _BUILTINS[name]
        check_installed(name)
        importlib.import_module(builtin.module)
    if name not in _registered:
        raise ValueError(
            f"unknown environment {name!r}; known: {', '.join(known_envs())}. An environment of another package must "
            "be imported first: name its module in sdar.modules, or with a command's --modules"
        )
    return _registered[name]


def _check_options(name: str, factory: Callable[..., TextEnv], options: dict[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ValueError(
            f"environment {name!r} has no option {', '.join(map(repr, unknown))}; known: {', '.join(known) or 'none'}. "
            f"Those that a recipe sets for its own environment are left out with "
            f"{' '.join(f'~sdar.env.options.{option}' for option in unknown)}"
        )
    missing = [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in options]
    if missing:
        raise ValueError(f"environment {name!r} needs the option {', '.join(map(repr, missing))}")


@contextlib.contextmanager
def _authors_faults(name: str, what: str) -> Iterator[None]:
    """Errors that an environment raises on purpose pass; others (a TypeError for an abstract method, the exit of a
    parser that reads the command line) are named."""
    try:
        yield
    except (ValueError, ImportError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"environment {name!r} {what}: {type(error).__name__}: {error}") from error


def _check_class(name: str, env: Any) -> None:
    """Raise ValueError when ``env`` is no environment, or says something about itself in the wrong form."""
    if not isinstance(env, TextEnv):
        raise ValueError(f"environment {name!r} is {shorten(env)}; it must be a sdar_verl.envs.base.TextEnv")
    for attribute in ("action_tags", "task_types"):
        texts = getattr(env, attribute)
        if not isinstance(texts, tuple | list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"environment {name!r}: {attribute} must be a tuple of names, such as ('search', 'answer') or "
                f"('action',), not {shorten(texts)}"
            )
    if bad := [tag for tag in env.action_tags if not TAG_NAME.fullmatch(tag)]:
        raise ValueError(
            f"environment {name!r}: action_tags holds {shorten(bad[0])}; a tag's name is in lower case and without "
            "brackets, such as 'search'"
        )
    if not env.action_tags:
        raise ValueError(f"environment {name!r}: action_tags is empty; ('action',) is the default")
    _check_methods(name, env)
    if not isinstance(env.thread_safe, bool):
        raise ValueError(f"environment {name!r}: thread_safe must be True or False, not {shorten(env.thread_safe)}")
    if not isinstance(env.task_type_aliases, Mapping):
        raise ValueError(
            f"environment {name!r}: task_type_aliases must be a dict of a type and its other names, not "
            f"{shorten(env.task_type_aliases)}"
        )
    if not isinstance(env.longest_step_s, Real) or math.isnan(env.longest_step_s):
        raise ValueError(
            f"environment {name!r}: longest_step_s must be a number of seconds, 0 for no limit of its own, "
            f"not {shorten(env.longest_step_s)}"
        )


def _check_methods(name: str, env: TextEnv) -> None:
    """Raise ValueError for a method that cannot be called as the agent loop does: gym's have other arguments, and what
    an async one does is never awaited."""
    for method, arguments in (("reset", ("task",)), ("step", ("action",)), ("check", ()), ("close", ())):
        function, right = getattr(env, method), f"{method}({', '.join(('self', *arguments))})"
        try:
            with contextlib.suppress(ValueError):  # what is written in C may have no signature
                inspect.signature(function).bind(*arguments)
        except TypeError as error:
            raise ValueError(f"environment {name!r}: {method} must be defined as {right} ({error})") from error
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise ValueError(f"environment {name!r}: {method} must be a plain function {right}, not an async one")
