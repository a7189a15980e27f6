"""Puts the shipped configs on Hydra's search path, so that ``--config-name sdar_alfworld`` works from any folder."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin


class SdarSearchPath(SearchPathPlugin):
    """Appends ``sdar_verl.hydra_configs`` after verl's own folder."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra's hook."""
        search_path.append(provider="sdar_verl", path="pkg://sdar_verl.hydra_configs")


Plugins.instance().register(SdarSearchPath)
