"""Tasks of a run's panels, as far as they can be read here."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from sdar_verl.envs.base import Task
from sdar_verl.panels import PanelError, panel_digest, read_panel


def panel_files(config: DictConfig, option: str) -> list[str]:
    """The local files of ``data.train_files`` or ``data.val_files``; remote ones (``hdfs://``) are verl's to fetch.

    As they are written: verl's dataset does not expand a ``~`` either.
    """
    files = config.data[option]
    listed = [files] if isinstance(files, str) else list(files or [""])
    return [str(file) for file in listed if "://" not in str(file)]


def panel_digests(config: DictConfig, option: str) -> list[str]:
    """The hash of each of :func:`panel_files`.

    Raises:
        PanelError: one is missing or not a panel of ours.
    """
    return [panel_digest(file) for file in panel_files(config, option)]


def panel_tasks(config: DictConfig, option: str) -> list[Task]:
    """All tasks of ``data.train_files`` or ``data.val_files``; what cannot be read is named by the data check."""
    tasks: list[Task] = []
    for file in panel_files(config, option):
        if Path(file).is_file():
            try:
                tasks += read_panel(file)
            except PanelError:
                continue
    return tasks
