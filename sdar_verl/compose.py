"""A recipe's whole config, composed outside of a run, as ``python -m verl.trainer.main_ppo`` would compose it."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from sdar_verl.errors import ConfigError


def compose_config(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose ``--config-name CONFIG_NAME OVERRIDES``.

    Raises:
        ConfigError: unknown config, group or key, in Hydra's words.
    """
    import verl  # noqa: F401  loads the plugin, which puts our configs on Hydra's search path

    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose(config_name, overrides=list(overrides))
    except HydraException as error:
        raise ConfigError(f"--config-name {config_name} {' '.join(overrides)}: {error}") from error
