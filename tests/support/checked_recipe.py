"""The quick start's recipe with panels that exist, for tests of the checks before a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import verl  # noqa: F401  loads the plugin, which puts our configs on the search path
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from sdar_verl.checks.run import check_run
from sdar_verl.config import load_config
from sdar_verl.envs.base import Task
from sdar_verl.panels import write_panel


def checked_recipe(folder: Path) -> DictConfig:
    """The composed recipe; its panels, of one task type, lie in ``folder``."""
    panels = [folder / "train.parquet", folder / "test.parquet"]
    for panel in panels:
        tasks = [Task("alfworld", f"game-{i:02d}", "pick_and_place_simple", "put a mug on desk") for i in range(16)]
        write_panel(tasks, panel, panel.stem)
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("sdar_quickstart", overrides=[f"data.train_files={panels[0]}", f"data.val_files={panels[1]}"])


def changed(recipe: DictConfig, **overrides: Any) -> DictConfig:
    """A copy of the recipe with these options."""
    config = copy.deepcopy(recipe)
    for option, value in overrides.items():
        OmegaConf.update(config, option, value, force_add=True)
    return config


def run_checks(recipe: DictConfig, **overrides: Any) -> None:
    """The checks of a run with these options."""
    config = changed(recipe, **overrides)
    check_run(config, load_config(config.sdar))
