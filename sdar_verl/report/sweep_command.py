"""``sdar-verl sweep``: methods times seeds, one run after the other, each in a folder of its own.

Every run's config is composed, and checked as the run itself would check it, before the first one starts: a misspelt
name in the last of them is told at once and not after a night.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdar_verl.arguments import check_above_zero, given_path
from sdar_verl.config_folders import add_folder_options, folders_of
from sdar_verl.errors import ConfigError
from sdar_verl.report.one_run import (
    FINISHED,
    OneByOne,
    check,
    check_finished,
    check_overrides,
    finish,
    run_command,
    tail,
)


def add_parser(subparsers: Any) -> None:
    """The sub-command and its options."""
    parser = subparsers.add_parser(
        "sweep",
        help="run methods x seeds in sequence, ready for `sdar-verl compare`",
        description="Starts `python -m verl.trainer.main_ppo` once per method and seed. A finished run is not run "
        "again, an unfinished one resumes from its latest checkpoint. Words that remain are verl overrides.",
    )
    parser.add_argument("--config-name", help="the recipe, such as sdar_alfworld")
    add_folder_options(parser)
    parser.add_argument(
        "--methods",
        type=_names,
        metavar="A,B,...",
        help="of the config group method; METHOD+CONTROL is the same with that placebo as the teacher's context",
    )
    parser.add_argument("--seeds", type=_seeds, metavar="0,1,...", help="default: 0")
    parser.add_argument("--out", required=True, type=given_path, metavar="DIR", help="runs are DIR/<method>-<seed>")
    parser.add_argument(
        "--plan", type=given_path, metavar="FILE", help="an evaluation plan instead (recipes/evaluation, docs/cloud.md)"
    )
    parser.add_argument("--budget", type=float, metavar="USD", help="with --plan: for all its runs")
    parser.add_argument("--price", type=float, metavar="USD_PER_HOUR", help="with --plan: of what a run runs on")
    parser.add_argument("--gpu", help="with --plan: card of the estimate (default: h100-80gb)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only, if they compose")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="for all runs")
    parser.set_defaults(run=run)


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different names")
    return names


def _seeds(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds, such as 0,1,2")
    seeds = [int(part) for part in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return seeds


def command(
    config: str, method: str, seed: int, folder: Path, overrides: list[str], folders: Sequence[str] = ()
) -> list[str]:
    """What starts one run of ``method``, or ``method+control``."""
    return run_command(config, method, seed, folder, _own(method), overrides, folders)


def _own(method: str) -> list[str]:
    """What makes a run one of ``method``."""
    preset, plus, control = method.partition("+")
    return [f"method={preset}", *([f"sdar.context.control={control}"] if plus else [])]


def run(arguments: argparse.Namespace) -> int:
    """All runs, seed by seed; 1 when one of them did not finish, and :attr:`OneByOne.status` after a signal.

    Raises:
        ConfigError: see :func:`check` and :func:`check_overrides`.
    """
    _options(arguments)
    folders = folders_of(arguments).words
    if arguments.plan is not None:
        from sdar_verl.report.evaluation_run import run_plan

        given = (arguments.price, arguments.budget, arguments.gpu, arguments.dry_run, folders)
        return run_plan(arguments.plan, arguments.out, arguments.overrides, *given)
    out: Path = arguments.out.resolve()
    check_overrides({method: _own(method) for method in arguments.methods}, arguments.overrides, "--methods")
    commands = {}
    for seed, method in itertools.product(arguments.seeds, arguments.methods):
        folder = out / f"{method}-{seed}"
        commands[folder] = command(arguments.config_name, method, seed, folder, arguments.overrides, folders)
    # Seeds do not change what composes, so a dry run looks at the first one's runs.
    for folder, words in itertools.islice(commands.items(), len(arguments.methods) if arguments.dry_run else None):
        if (folder / FINISHED).is_file():
            check_finished(words, folder)
        else:
            check(words, whole=not arguments.dry_run)
    if arguments.dry_run:
        print(*map(shlex.join, commands.values()), sep="\n")
        return 0
    unfinished = []
    with OneByOne() as processes:
        for folder, words in commands.items():
            if (folder / FINISHED).is_file():
                print(f"{folder} is finished already")
                continue
            status = processes.start(words, folder).wait()
            if status:
                print(f"  failed with status {status}; the end of its log:", *tail(folder / "train.log"), sep="\n  ")
            if status or not finish(folder):
                unfinished.append(folder)
            if processes.status:
                return processes.status
    # By name: a placebo may be an override of all runs, and a method without a teacher has none.
    runs = [f"{method}={out / f'{method}-{seed}'}" for method in arguments.methods for seed in arguments.seeds]
    print(f"sdar-verl compare {shlex.join(runs)} --baseline {arguments.methods[0]}")
    if unfinished:
        print(
            f"{len(unfinished)} of {len(runs)} runs did not finish: {', '.join(map(str, unfinished))}", file=sys.stderr
        )
    return 1 if unfinished else 0


def _options(arguments: argparse.Namespace) -> None:
    """A sweep has methods, a plan its own."""
    of_a_sweep = {"--config-name": arguments.config_name, "--methods": arguments.methods, "--seeds": arguments.seeds}
    of_a_plan = {"--budget": arguments.budget, "--price": arguments.price, "--gpu": arguments.gpu}
    check_above_zero(arguments, "budget", "price")
    if arguments.plan is not None:
        idle = [name for name, value in of_a_sweep.items() if value is not None]
        if idle:
            raise ConfigError(f"{', '.join(idle)}: no effect with --plan, whose file says it; leave it out")
        return
    missing = [name for name in ("--config-name", "--methods") if of_a_sweep[name] is None]
    if missing:
        raise ConfigError(f"sweep needs {' and '.join(missing)}, or --plan FILE")
    idle = [name for name, value in of_a_plan.items() if value is not None]
    if idle:
        raise ConfigError(f"{', '.join(idle)}: no effect without --plan")
    arguments.seeds = arguments.seeds or [0]
