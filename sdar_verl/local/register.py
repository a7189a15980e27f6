"""Registers the CPU default with verl: platform at once, the rest when verl loads the registry it belongs to."""

from __future__ import annotations

import importlib
from types import ModuleType

import wrapt

from sdar_verl.local import on_cpu

ROLLOUT_NAME = "transformers"


def register_local() -> None:
    """On a machine without an accelerator, register platform, engine and rollout backend.

    Called by the plugin at the end of ``import verl``. The platform must be known before anything asks for one, and
    verl.workers.engine asks while it is imported. The other two belong to modules that take seconds to import and that
    most of verl's processes never load.
    """
    if not on_cpu():
        return
    import sdar_verl.local.platform  # noqa: F401

    wrapt.register_post_import_hook(_register_engine, "verl.workers.engine")
    wrapt.register_post_import_hook(_register_rollout_class, "verl.workers.rollout.base")
    wrapt.register_post_import_hook(_register_replica, "verl.workers.rollout.replica")


def _register_engine(_: ModuleType) -> None:
    importlib.import_module("sdar_verl.local.engine")


def _register_rollout_class(module: ModuleType) -> None:
    # A private table, but the one that get_rollout_class reads, and verl has no function to add to it.
    module._ROLLOUT_REGISTRY[ROLLOUT_NAME, "async"] = "sdar_verl.local.rollout.ServerAdapter"


def _register_replica(module: ModuleType) -> None:
    def load() -> type:
        from sdar_verl.local.rollout import TransformersReplica

        return TransformersReplica

    module.RolloutReplicaRegistry.register(ROLLOUT_NAME, load)
