"""``sdar-verl doctor``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sdar_verl.config_folders import add_folder_options, folders_of


def add_parser(commands: Any) -> None:
    """Add ``doctor`` to ``sdar-verl``."""
    parser = commands.add_parser(
        "doctor",
        help="check the installation, and with --config-name a run, before anything is started",
        description="Green, yellow and red lines, each with a remedy. Exit status 1 when one is red.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--config-name", help="recipe whose run is checked too, e.g. sdar_alfworld")
    add_folder_options(parser)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for the run")
    parser.add_argument("--no-ray", action="store_true", help="do not ask a Ray worker for the plugin (saves seconds)")
    parser.add_argument(
        "--resets",
        type=int,
        default=None,
        metavar="N",
        help="tasks that are started, to measure prompts (default: 4)",
    )
    parser.add_argument(
        "--cloud", action="store_true", help="also the nodes and the mirror of a run on rented machines (docs/cloud.md)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 without red lines, 1 with."""
    from sdar_verl.doctor.findings import as_json, as_text, exit_status
    from sdar_verl.doctor.installation import check_installation
    from sdar_verl.doctor.machine import look_around
    from sdar_verl.errors import ConfigError

    if arguments.overrides and not arguments.config_name:
        raise ConfigError(f"overrides {arguments.overrides} have no effect without --config-name; name the recipe")
    folders = folders_of(arguments)
    if folders.words and not arguments.config_name:
        raise ConfigError(f"{' '.join(folders.words)}: no effect without --config-name; name the recipe")
    if arguments.resets is not None and not arguments.config_name:
        raise ConfigError(f"--resets {arguments.resets}: no effect without --config-name; name the recipe")
    resets = 4 if arguments.resets is None else arguments.resets
    if resets < 0:
        raise ConfigError(f"--resets {resets}: at least 0")
    if arguments.cloud and not arguments.config_name:
        raise ConfigError("--cloud looks at a run's nodes and mirror: name its recipe with --config-name")
    if arguments.cloud and arguments.no_ray:
        raise ConfigError("--cloud looks at the nodes through Ray: leave --no-ray out")
    machine = look_around(ray=not arguments.no_ray)
    findings = check_installation(machine)
    if arguments.config_name:
        from sdar_verl.doctor.run_checks import check_config

        findings += check_config(arguments.config_name, arguments.overrides, machine, resets, folders)
    if arguments.cloud:
        from sdar_verl.compose import compose_config
        from sdar_verl.config import load_config
        from sdar_verl.doctor.cloud import check_cloud

        config = compose_config(arguments.config_name, arguments.overrides, folders)
        findings += check_cloud(config, load_config(config.sdar))
    if arguments.json:
        print(json.dumps(as_json(findings), indent=1))
    else:
        print(as_text(findings, colour=sys.stdout.isatty()))
    return exit_status(findings)
