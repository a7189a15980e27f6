"""``sdar-verl stop`` and ``sdar-verl guard``."""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from sdar_verl.arguments import check_above_zero
from sdar_verl.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """The sub-commands and their options."""
    _add_stop(subparsers)
    _add_guard(subparsers)


def _add_stop(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "stop",
        help="ask a run to end in order after its step: checkpoint, mirror, exit status 0",
        description="Leaves a file that the run looks for after every step. Through its mirror a run anywhere can be "
        "stopped. The next start of the run goes on from the checkpoint.",
    )
    parser.add_argument("run_dir", metavar="RUN", help="the run's trainer.default_local_dir, or its sdar.cloud.mirror")
    parser.add_argument("--reason", default="asked to stop by hand", help="for the log and the ledger")
    parser.add_argument(
        "--again",
        action="store_true",
        help="its machine goes away: end this attempt alone, and let its guard ask for another start (status 75)",
    )
    parser.set_defaults(run=run_stop)


def run_stop(arguments: argparse.Namespace) -> int:
    """Leave the wish where a run is.

    Raises:
        ConfigError: there is none.
    """
    from sdar_verl.cloud import ledger, stop
    from sdar_verl.cloud.store import Store
    from sdar_verl.verl.resume import RUN_FILE

    store = Store(arguments.run_dir)
    for place in (store, Store(f"{store.place}/checkpoints")):
        if place.read(RUN_FILE) is not None:
            attempt = ledger.newest(place) if arguments.again else None
            if arguments.again and attempt is None:
                raise ConfigError(f"--again: {place.place} has no attempt that could end and go on elsewhere")
            stop.ask([place], stop.Wish(arguments.reason, attempt, arguments.again))
            status = "75 from its guard, if it has one" if arguments.again else "0"
            print(f"{place.place} is asked to stop; it ends after the step under way, with status {status}")
            return 0
    raise ConfigError(
        f"{arguments.run_dir} holds no {RUN_FILE}, so it is no run's; give trainer.default_local_dir or "
        "sdar.cloud.mirror of the run"
    )


def _add_guard(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "guard",
        help="run a training command: orderly end on SIGTERM, spot notice, hang or spent budget",
        description="Runs COMMAND. Exit status 0: done, or the budget is spent; 75: start me again; 2: configuration.",
        usage="sdar-verl guard [options] -- COMMAND ...",
    )
    parser.add_argument("--budget", type=float, metavar="USD", help="for all attempts at the run together")
    parser.add_argument("--price", type=float, metavar="USD_PER_HOUR", help="of all nodes together")
    parser.add_argument("--spot", action=argparse.BooleanOptionalAction, help="for the ledger: may it be taken away?")
    parser.add_argument(
        "--hang", type=float, default=30, metavar="MIN", help="end a run without a step for so long (default: 30)"
    )
    parser.add_argument(
        "--grace", type=float, default=100, metavar="S", help="seconds from SIGTERM to the end (default: 100)"
    )
    parser.set_defaults(run=run_guard)


def run_guard(arguments: argparse.Namespace) -> int:
    """Check what was given; run the command.

    Raises:
        ConfigError: names the option.
    """
    from sdar_verl.cloud.guard import Guard, Limits

    command = arguments.command_line
    if not command:
        raise ConfigError("guard needs a command after --, such as: sdar-verl guard -- bash scripts/quickstart.sh")
    if shutil.which(command[0]) is None:
        raise ConfigError(f"guard: {command[0]} is no program that can be found")
    check_above_zero(arguments, "budget", "price", "hang", "grace")
    if arguments.budget is not None and arguments.price is None:
        raise ConfigError(
            f"--budget {arguments.budget:g} has no effect without a price: add --price USD_PER_HOUR, what all nodes "
            "cost together (sdar-verl plan --cloud lists prices)"
        )
    limits = Limits(arguments.budget, arguments.price, arguments.spot, 60 * arguments.hang, arguments.grace)
    return Guard(command, limits).run()
