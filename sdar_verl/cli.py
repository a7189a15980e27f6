"""The command ``sdar-verl``: finds the sub-commands in their rooms and runs the one that is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from sdar_verl._version import __version__
from sdar_verl.errors import SdarError
from sdar_verl.untrusted import printable

# Modules with add_parser(subparsers), which sets run=function(arguments) -> exit status. They import what takes time
# (torch, verl, an environment's engine) when they run, so that --help is quick.
_PREPARE = tuple(f"sdar_verl.envs.{env}.command" for env in ("alfworld", "search", "webshop"))
_COMMANDS = (
    "sdar_verl.planner.command",
    "sdar_verl.envs.search.serve",
    "sdar_verl.report.command",
    "sdar_verl.report.compare_command",
    "sdar_verl.report.sweep_command",
    "sdar_verl.skills.command",
    "sdar_verl.doctor.command",
    "sdar_verl.cloud.command",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (2 for errors that the user can mend)."""
    parser = _parser()
    words, behind = guarded(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser.parse_known_args(words)
    arguments.command_line = behind
    # argparse takes positional words in one run only; Hydra overrides may stand on both sides of an option.
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(arguments, "overrides")):
        further = {"prepare": "env", "skills": "action"}.get(arguments.command)
        command = " ".join([arguments.command, *([getattr(arguments, further)] if further else [])])
        parser.error(f"unrecognized arguments: {' '.join(rest)}; `sdar-verl {command} --help` lists what there is")
    elif rest:
        arguments.overrides += rest
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("sdar-verl: interrupted", file=sys.stderr)
        return 130
    except (SdarError, ImportError, ValueError, OSError) as error:
        print(f"sdar-verl: error: {printable(str(error))}", file=sys.stderr)
        return 2


def guarded(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words, and the command that a guard is to run: argparse would read its options, too."""
    if words[:1] != ["guard"] or "--" not in words:
        return list(words), []
    at = list(words).index("--")
    return list(words[:at]), list(words[at + 1 :])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdar-verl", description="SDAR as a plugin of stock verl: the tools around it"
    )
    parser.add_argument("--version", action="version", version=f"sdar-verl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="make an environment's task panels (parquet files for verl)")
    environments = prepare.add_subparsers(dest="env", required=True, metavar="ENVIRONMENT")
    for module in _PREPARE:
        importlib.import_module(module).add_parser(environments)
    for module in _COMMANDS:
        importlib.import_module(module).add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
