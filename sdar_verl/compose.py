"""A recipe's whole config, composed outside of a run, as ``python -m verl.trainer.main_ppo`` would compose it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from sdar_verl.config import load_config
from sdar_verl.config_folders import ConfigFolders
from sdar_verl.errors import ConfigError


def compose_config(config_name: str, overrides: Sequence[str] = (), folders: ConfigFolders | None = None) -> DictConfig:
    """Compose ``--config-dir DIR --config-path DIR --config-name CONFIG_NAME OVERRIDES``.

    Raises:
        ConfigError: a folder that does not exist; unknown config, group or key, in Hydra's words.
    """
    import verl  # loads the plugin, which puts our configs on Hydra's search path

    from sdar_verl.hydra_search_path import also_searched

    folders = folders or ConfigFolders()
    path = None if folders.path is None else Path(verl.__file__).parent / "trainer" / folders.path
    for option, given, folder in (
        ("--config-dir", folders.dir, Path(folders.dir or ".")),
        ("--config-path", folders.path, path or Path(".")),
    ):
        if given is not None and not folder.is_dir():
            where = "" if os.path.isabs(given) else f" ({os.path.abspath(folder)})"
            raise ConfigError(
                f"{option} {given}{where} is no folder, so that --config-name {config_name} cannot be looked for in it"
            )
    GlobalHydra.instance().clear()
    words = " ".join([*folders.words, "--config-name", config_name])
    try:
        with (
            also_searched(folders.dir),
            initialize_config_module("verl.trainer.config", version_base=None)
            if path is None
            else initialize_config_dir(os.path.abspath(path), version_base=None),
        ):
            return compose(config_name, overrides=list(overrides))
    except (HydraException, yaml.YAMLError) as error:
        raise ConfigError(f"{_told(str(error))}\n({words})") from error


def _told(error: str) -> str:
    """Hydra's words; of an option that we do not have ours, since to append it, as Hydra advises, leads nowhere."""
    if found := re.match(r"Could not override 'sdar\.([\w.]+)'", error):
        node = OmegaConf.create()
        OmegaConf.update(node, found[1], None)
        try:
            load_config(node)
        except ConfigError as ours:
            if told := [line for line in str(ours).splitlines() if "no such option" in line]:
                return "\n".join(told)
    return error
