"""Puts the shipped configs on Hydra's search path, so that ``--config-name sdar_alfworld`` works from any folder, and a
callback into its own config, which sees runs without any config of ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

CHECKOUT_CONFIGS = Path(__file__).resolve().parents[1] / "hydra_configs"

_folder: ContextVar[str | None] = ContextVar("sdar_verl_config_dir", default=None)


class SdarSearchPath(SearchPathPlugin):
    """Appends ``sdar_verl.hydra_configs`` after verl's own folder."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra's hook."""
        # A checkout on Python's path hides the installed package, and has the configs at its root.
        installed = find_spec("sdar_verl.hydra_configs") is not None
        folder = "pkg://sdar_verl.hydra_configs" if installed else f"file://{CHECKOUT_CONFIGS}"
        search_path.append(provider="sdar_verl", path=folder)
        if further := _folder.get():  # last, where Hydra's main function has it
            search_path.append(provider="command-line", path=f"file://{os.path.abspath(further)}")


@contextmanager
def also_searched(folder: str | None) -> Iterator[None]:
    """Have configs composed within with ``--config-dir folder``, for which Hydra's compose API has no argument."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


Plugins.instance().register(SdarSearchPath)
ConfigStore.instance().store(
    group="hydra",
    name="config",
    node=HydraConf(callbacks={"sdar_node": {"_target_": "sdar_verl.missing_node.NeedsNode"}}),
    provider="sdar_verl",
)
