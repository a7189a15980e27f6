"""The only door to verl's registries; entry point of the group ``verl.plugins``.

verl imports this module at the end of ``import verl`` in every process: driver, Ray actors, workers. So it imports next
to nothing itself: each registration waits until verl loads the registry it belongs to, and a process that never does
so (most of them) pays nothing. verl drops an exception of a plugin at debug level and goes on without it; here it is
shown on stderr first.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from types import ModuleType

import wrapt

# Module that holds a registry (or that the next one builds on), and module of ours that registers when imported.
_REGISTRATIONS = (
    ("verl.trainer.ppo.core_algos", "sdar_verl.verl.advantage"),
    ("verl.trainer.ppo.v1", "sdar_verl.verl.trainer"),
    ("sdar_verl.verl.trainer", "sdar_verl.verl.async_modes"),
    ("verl.experimental.agent_loop", "sdar_verl.rollout.agent_loop"),
    ("verl.experimental.agent_loop", "sdar_verl.verl.taught_loop"),
    ("verl.workers.engine", "sdar_verl.verl.engines"),
    ("hydra.core.plugins", "sdar_verl.hydra_search_path"),
    ("omegaconf", "sdar_verl.resolvers"),
)


def _import_loudly(name: str) -> Callable[[ModuleType], None]:
    def load(_: ModuleType) -> None:
        try:
            importlib.import_module(name)
        except Exception:
            _complain(f"sdar_verl could not register {name} with verl")
            raise

    return load


def _complain(what: str) -> None:
    print(
        f"\n{traceback.format_exc()}\n{what}: see the error above. Without it verl would go on as if sdar_verl were "
        "not installed. Repair the installation (pip install --upgrade --force-reinstall sdar-verl), or run verl "
        "without this plugin: VERL_USE_EXTERNAL_PLUGINS=none\n",
        file=sys.stderr,
        flush=True,
    )


def register() -> None:
    """Register everything; called once, at import."""
    from sdar_verl.compat import check_verl_version
    from sdar_verl.local.register import register_local

    check_verl_version()
    for registry, module in _REGISTRATIONS:
        wrapt.register_post_import_hook(_import_loudly(module), registry)
    register_local()


try:
    register()
except Exception:
    _complain("the sdar_verl plugin could not be loaded into verl")
    raise
