"""``sdar-verl prepare alfworld``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from sdar_verl.arguments import given_path
from sdar_verl.envs.alfworld.prepare import PANELS, Source, prepare
from sdar_verl.envs.alfworld.spec import DEFAULT_HOUSEHOLD_SEED, TASK_TYPES, GeneratorConfig
from sdar_verl.envs.prepared import show_panels
from sdar_verl.errors import SdarError

_GENERATED_COUNTS = {"train": 512, "validation": 128, "test": 128}

# Options that only make sense when games are generated, and the fields of GeneratorConfig that they set.
_GENERATOR_OPTIONS = {
    "receptacles": "n_receptacles",
    "distractors": "n_distractors",
    "p_home": "p_home",
    "household_seed": "household_seed",
    "processes": None,
}


def add_parser(envs: Any) -> None:
    """Add ``alfworld`` to ``sdar-verl prepare``."""
    alfworld = envs.add_parser(
        "alfworld",
        help="ALFWorld: from its downloaded games, or from games generated here",
        description="Writes train.parquet, validation.parquet, test.parquet and panel.json. Panels are sorted and "
        "hashed: the same options give the same tasks on any machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    alfworld.set_defaults(run=_run)
    alfworld.add_argument("--out", required=True, type=given_path, help="folder to write to")
    alfworld.add_argument(
        "--data",
        type=given_path,
        help="ALFWorld's data folder, the one that holds json_2.1.1; by default $ALFWORLD_DATA",
        default=argparse.SUPPRESS,
    )
    alfworld.add_argument("--generate", action="store_true", help="generate games instead of reading downloaded ones")
    for panel, split in PANELS.items():
        alfworld.add_argument(
            f"--{panel}",
            type=int,
            metavar="N",
            default=argparse.SUPPRESS,
            help=f"tasks of the {panel} panel ({split}); by default all downloaded games, "
            f"or {_GENERATED_COUNTS[panel]} generated ones",
        )
    alfworld.add_argument(
        "--seed", type=int, default=0, help="of the generated games, or of the choice among downloaded"
    )
    alfworld.add_argument("--task-types", nargs="+", choices=TASK_TYPES, metavar="TYPE", default=list(TASK_TYPES))
    alfworld.add_argument("--force", action="store_true", help="replace panels that were made with other options")
    generated = alfworld.add_argument_group("with --generate")
    defaults = GeneratorConfig()
    for name, type_, text in (
        ("receptacles", int, f"receptacles per room (default: {defaults.n_receptacles})"),
        ("distractors", int, f"objects per room beside the target (default: {defaults.n_distractors})"),
        ("p-home", float, f"probability that an object lies at its usual place (default: {defaults.p_home})"),
        ("household-seed", int, f"which map of usual places (default: {DEFAULT_HOUSEHOLD_SEED})"),
        ("processes", int, "processes that generate (default: the CPUs of this machine, at most 8)"),
    ):
        generated.add_argument(f"--{name}", type=type_, metavar="N", default=argparse.SUPPRESS, help=text)


def _run(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    counts = {panel: given[panel] for panel in PANELS if panel in given}
    if arguments.generate:
        if "data" in given:
            raise SdarError(f"--data {given['data']} has no effect with --generate; leave one of them out")
        fields = {field: given[option] for option, field in _GENERATOR_OPTIONS.items() if field and option in given}
        config = GeneratorConfig(seed=arguments.seed, task_types=_in_order(arguments.task_types), **fields)
        source = Source(counts={**_GENERATED_COUNTS, **counts}, generator=config)
    else:
        for option in _GENERATOR_OPTIONS:
            if option in given:
                raise SdarError(
                    f"--{option.replace('_', '-')} only has an effect with --generate; leave it out or add that"
                )
        source = Source(
            counts=counts, task_types=_in_order(arguments.task_types), seed=arguments.seed, data=given.get("data")
        )
    outcome = prepare(
        source,
        arguments.out,
        force=arguments.force,
        processes=given.get("processes", min(8, os.cpu_count() or 1)),
        progress=_show_progress,
    )
    show_panels(arguments.out, outcome)
    return 0


def _in_order(task_types: Sequence[str]) -> tuple[str, ...]:
    """Without repetition, in ALFRED's order: the order of the option must not change the games."""
    return tuple(task_type for task_type in TASK_TYPES if task_type in task_types)


def _show_progress(panel: str, done: int, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\rgenerating {panel}: {done}/{count}", end="\n" if done == count else "", file=sys.stderr, flush=True)
    elif done == count or done % max(1, count // 4) == 0:
        print(f"generating {panel}: {done}/{count}", file=sys.stderr, flush=True)
