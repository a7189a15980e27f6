"""``sdar-verl prepare webshop``."""

from __future__ import annotations

import argparse
from typing import Any

from sdar_verl.arguments import given_path
from sdar_verl.envs.prepared import show_panels
from sdar_verl.envs.registry import check_installed
from sdar_verl.envs.webshop.catalogue import PRODUCTS_FILES
from sdar_verl.envs.webshop.generate import CatalogueConfig
from sdar_verl.envs.webshop.prepare import MAX_TRAIN, PANELS, Source, prepare
from sdar_verl.errors import SdarError


def add_parser(environments: Any) -> None:
    """Add the command to the sub-parsers of ``prepare``."""
    parser = environments.add_parser(
        "webshop",
        help="WebShop: from its downloaded files, or from a catalogue generated here",
        description="Writes train.parquet, validation.parquet, test.parquet, panel.json and the catalogue with its "
        "search index. Panels are sorted and hashed: the same options give the same tasks on any machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--out", required=True, type=given_path, help="folder to write to")
    parser.add_argument(
        "--data",
        type=given_path,
        help="folder of WebShop's downloaded files (items_shuffle*.json ...)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--size", choices=PRODUCTS_FILES, help="which of them, when both are there", default=argparse.SUPPRESS
    )
    parser.add_argument("--generate", action="store_true", help="generate a catalogue instead of reading a download")
    parser.add_argument(
        "--products",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help=f"products of a generated catalogue (default: {CatalogueConfig().products})",
    )
    parser.add_argument(
        "--human-goals", action="store_true", help="instructions written by people instead of synthetic ones"
    )
    parser.add_argument(
        "--split",
        choices=PANELS,
        default="webshop",
        help="webshop: goals 0 to 499 of its shuffled list are the test panel, 500 to 1499 validation, the rest "
        "training; released: 0 to 499 validation, the rest training, as SDAR's released code",
    )
    for panel in PANELS["webshop"]:
        parser.add_argument(
            f"--{panel}",
            type=int,
            metavar="N",
            default=argparse.SUPPRESS,
            help=f"tasks of the {panel} panel; by default all"
            + (f", at most {MAX_TRAIN:,}" if panel == "train" else ""),
        )
    parser.add_argument(
        "--nouns",
        choices=("spacy", "rules"),
        default=argparse.SUPPRESS,
        help="how the nouns of titles are found, by which the reward knows the kind of a product: by spaCy as WebShop "
        "does, or by rules (default: spacy with --data, rules with --generate)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the catalogue, of prices and of the choice among goals")
    parser.add_argument("--force", action="store_true", help="replace panels that were made with other options")


def run(arguments: argparse.Namespace) -> int:
    """Make the panels and show them.

    Raises:
        ImportError: the extra is not installed.
        SdarError: an option has no effect beside the others, or see :func:`prepare`.
    """
    check_installed("webshop")
    given = vars(arguments)
    generator = None
    if arguments.generate:
        for option in ("data", "size"):
            if option in given:
                raise SdarError(f"--{option} {given[option]} has no effect with --generate; leave one of them out")
        config = CatalogueConfig()
        generator = CatalogueConfig(seed=arguments.seed, products=given.get("products", config.products))
    elif "products" in given:
        raise SdarError("--products only has an effect with --generate; leave it out or add that")
    source = Source(
        counts={panel: given[panel] for panel in PANELS["webshop"] if panel in given},
        kind="human" if arguments.human_goals else "synthetic",
        split=arguments.split,
        seed=arguments.seed,
        generator=generator,
        data=given.get("data"),
        size=given.get("size"),
        nouns=given.get("nouns"),
    )
    show_panels(arguments.out, prepare(source, arguments.out, force=arguments.force))
    return 0
