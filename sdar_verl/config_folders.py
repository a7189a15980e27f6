"""Options of the sub-commands for YAML files of the user's own, as Hydra's main function has them."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ConfigFolders:
    """Hydra's options for YAML files of the user's own.

    Attributes:
        dir: ``--config-dir``: searched after verl's folder and ours.
        path: ``--config-path``: searched instead of verl's folder; Hydra takes a relative one from verl's ``trainer``.
    """

    dir: str | None = None
    path: str | None = None

    @property
    def words(self) -> list[str]:
        """The options as words of a command that may be started in another folder."""
        return [
            *(() if self.dir is None else ("--config-dir", os.path.abspath(self.dir))),
            *(() if self.path is None else ("--config-path", self.path)),
        ]


def add_folder_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :class:`ConfigFolders` to a sub-command that composes a config."""
    parser.add_argument("--config-dir", metavar="DIR", help="folder with YAML files of your own, as for main_ppo")
    parser.add_argument("--config-path", metavar="DIR", help="such a folder in the place of verl's, as for main_ppo")


def folders_of(arguments: argparse.Namespace) -> ConfigFolders:
    """What was given for the options of :func:`add_folder_options`."""
    return ConfigFolders(arguments.config_dir, arguments.config_path)
