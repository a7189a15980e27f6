"""``sdar-verl plan``."""

from __future__ import annotations

import argparse
import datetime
import json
import math
from pathlib import Path
from typing import Any

from sdar_verl.arguments import check_above_zero, given_path
from sdar_verl.config_folders import add_folder_options, folders_of


def add_parser(commands: Any) -> None:
    """Add ``plan`` to ``sdar-verl``."""
    parser = commands.add_parser(
        "plan",
        help="memory per GPU and phase, time per step, GPU-hours of a recipe",
        description="What a run of a recipe needs, before a GPU is rented. Lengths that only a run can know are "
        "guesses unless given; docs/planner.md has the arithmetic and how far it was off.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--config-name", default="sdar_alfworld", help="recipe (default: sdar_alfworld)")
    add_folder_options(parser)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. model=qwen2.5-7b trainer.n_gpus_per_node=4")
    parser.add_argument("--gpu", help="card (default: h100-80gb)")
    parser.add_argument("--price", type=float, metavar="P", help="of a GPU-hour, in any currency")
    parser.add_argument(
        "--turns", type=float, help="turns per episode (default: half of sdar.env.max_steps; 1 with other agent loops)"
    )
    parser.add_argument("--prompt", type=float, help="tokens of a prompt (default: half of data.max_prompt_length)")
    parser.add_argument("--context", type=float, help="tokens that the teacher's context adds")
    parser.add_argument("--response", type=float, help="tokens of a response (default: a third of the limit)")
    for name, text in (
        ("training-efficiency", "share of the card's FLOP/s in the update (default: 0.35)"),
        ("forward-efficiency", "the same in log-prob passes (default: 0.4)"),
        ("decode-efficiency", "share of the card's bandwidth while tokens are written (default: 0.6)"),
    ):
        parser.add_argument(f"--{name}", type=float, metavar="E", help=text)
    parser.add_argument("--recommend", action="store_true", help="find the layout that fits on fewest cards")
    cloud = parser.add_argument_group("rented machines (docs/cloud.md)")
    cloud.add_argument("--cloud", action="store_true", help="what the run costs on the machines that it fits on")
    cloud.add_argument("--node", metavar="NAME", help="this machine only, such as p5.48xlarge")
    cloud.add_argument("--region", help="this region only, where the table has regions")
    cloud.add_argument(
        "--prices", type=given_path, metavar="FILE", help="a CSV like sdar_verl/planner/prices.csv instead"
    )
    for name, what in (
        ("interruption", "hours between interruptions of a spot machine (default: 4)"),
        ("restart", "minutes from an interruption to the first step (default: 15)"),
        ("disk-rate", "MB/s of a node's disk (default: 1000)"),
        ("upload-rate", "MB/s from a node to the mirror (default: 300)"),
    ):
        cloud.add_argument(f"--{name}", type=float, metavar="X", help=what)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE", help="write the memory as stacked bars (png, svg, pdf)")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 when the run fits, 1 when it does not."""
    from sdar_verl.checks.options import type_faults
    from sdar_verl.compose import compose_config
    from sdar_verl.config import load_config
    from sdar_verl.errors import ConfigError
    from sdar_verl.modules import import_modules
    from sdar_verl.planner.hardware import DEFAULT_GPU, Efficiency, find_gpu
    from sdar_verl.planner.own_data import read_layout
    from sdar_verl.planner.plan import changed, make_plan, recommend
    from sdar_verl.planner.show import as_dict, as_text, draw

    shares = {"training": arguments.training_efficiency, "forward": arguments.forward_efficiency}
    shares["decode"] = arguments.decode_efficiency
    for name, share in shares.items():
        if share is not None and not 0.0 < share <= 1.0:
            raise ConfigError(f"--{name}-efficiency {share}: must lie in (0, 1]")
    check_above_zero(arguments, "turns", "prompt", "response", "price")
    if arguments.context is not None and not 0 <= arguments.context < math.inf:
        raise ConfigError(f"--context {arguments.context:g}: must be at least 0")
    efficiency = Efficiency(**{name: share for name, share in shares.items() if share is not None})
    given = _assumptions(arguments)
    gpu = find_gpu(arguments.gpu or DEFAULT_GPU)
    config = compose_config(arguments.config_name, arguments.overrides, folders_of(arguments))
    sdar = load_config(config.get("sdar"))
    if faults := type_faults(config, sdar):  # it calculates with them
        raise ConfigError("\n".join(faults))
    import_modules(sdar.modules)
    lengths = {name: getattr(arguments, name) for name in ("turns", "prompt", "context", "response")}
    wished, notes, stops = read_layout(config, sdar, lengths)
    if arguments.cloud and not wished.known:
        raise ConfigError(f"--cloud prices a whole run, and {'; '.join(stops) or wished.unknown}")
    notes += [f"this run would not start: {why}; `sdar-verl doctor` looks at all of it" for why in stops]
    if arguments.cloud:
        return _cloud(arguments, wished, efficiency, given, notes) or int(bool(stops))
    plan = make_plan(wished, gpu, efficiency)
    advice = []
    if arguments.recommend:
        found = recommend(wished, gpu, efficiency)
        if found is None:
            advice.append(
                f"no layout fits on up to 64 x {gpu.name}; a card with more memory, LoRA or a smaller model would"
            )
        else:
            plan = found
            advice += changed(wished, found.layout) or ["the recipe as it is"]
    if arguments.json:
        print(json.dumps({**as_dict(plan, arguments.price), "data": notes, "recommended": advice}, indent=1))
    else:
        print("\n".join([*notes, as_text(plan, arguments.price)]))
        if advice:
            print("\n".join(["", "recommended:", *(f"  {note}" for note in advice)]))
    if arguments.plot:
        draw(plan, arguments.plot)
    return 0 if plan.fits and not stops else 1


_CLOUD = {"interruption": ("interruption_h", 1.0), "restart": ("restart_s", 60.0)}
_CLOUD |= {"disk_rate": ("disk", 1e6), "upload_rate": ("upload", 1e6)}


def _assumptions(arguments: argparse.Namespace) -> Any:
    from sdar_verl.errors import ConfigError
    from sdar_verl.planner.cloud import Assumptions

    given = {}
    check_above_zero(arguments, *_CLOUD)
    for name, (field, unit) in _CLOUD.items():
        value = getattr(arguments, name)
        if value is not None:
            given[field] = value * unit
    names = ["node", "region", "prices", *_CLOUD]
    idle = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]
    if idle and not arguments.cloud:
        raise ConfigError(f"{', '.join(idle)}: no effect without --cloud; add it")
    idle = [f"--{name}" for name in ("gpu", "price", "recommend", "plot") if getattr(arguments, name)]
    if idle and arguments.cloud:
        raise ConfigError(
            f"{', '.join(idle)}: no effect with --cloud, which takes machines and prices from its table, and as few "
            "machines as fit; leave it out, or --cloud"
        )
    return Assumptions(**given)


def _cloud(arguments: argparse.Namespace, wished: Any, efficiency: Any, given: Any, notes: list[str]) -> int:
    from sdar_verl.planner.cloud import offers
    from sdar_verl.planner.cloud_show import as_dict, as_text
    from sdar_verl.planner.prices import choose, nodes, rates

    sky = None if arguments.prices else Path.home() / ".sky"
    listed = choose(nodes(arguments.prices, sky), arguments.node, arguments.region)
    found = offers(wished, listed, given, efficiency)
    what = (found, given, rates(), datetime.date.today())
    print(
        json.dumps({**as_dict(*what), "data": notes}, indent=1)
        if arguments.json
        else "\n".join([*notes, as_text(*what)])
    )
    return 0 if found else 1
