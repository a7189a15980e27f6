"""Modules of third parties that register names of their own: gates, contexts, retrieval rules, environments.

verl runs a driver, agent-loop processes, environment processes and actor workers, each a Python process with registries
of its own. Every one of them that looks a name up imports the modules of ``sdar.modules`` first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import update_wrapper
from typing import Any

from sdar_verl.errors import ConfigError


def import_modules(modules: Iterable[str]) -> None:
    """Import ``modules`` in order; one that is imported already does nothing.

    Raises:
        ConfigError: a module is not there, or fails; names the option, the module and the reason.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:  # a script's parser of the command line ends the process
            remedy = ""
            if isinstance(error, ImportError):
                remedy = "; it must be importable in every process of the run (install its package, or put its folder "
                remedy += "on PYTHONPATH)"
            raise ConfigError(
                f"sdar.modules: {module} cannot be imported here: {type(error).__name__}: {error}{remedy}"
            ) from error


class Importing:
    """``function``, with ``modules`` imported before its first call: for a function that is sent to another process.

    Args:
        function: what to call; picklable.
        modules: see :func:`import_modules`.
    """

    def __init__(self, function: Callable[..., Any], modules: Iterable[str]) -> None:
        self._function = function
        self._modules = tuple(modules)
        update_wrapper(self, function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import_modules(self._modules)
        return self._function(*args, **kwargs)
