"""``sdar-verl prepare search``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdar_verl.arguments import given_path
from sdar_verl.envs.prepared import show_panels
from sdar_verl.envs.search.dataset import PANELS, QuestionFile
from sdar_verl.envs.search.passages import check_corpus
from sdar_verl.envs.search.prepare import CORPUS_FILE, GENERATED_COUNTS, HELD_OUT, Source, prepare
from sdar_verl.envs.search.world import MAX_SCALE
from sdar_verl.errors import SdarError


def add_parser(environments: Any) -> None:
    """Add the command to the sub-parsers of ``prepare``."""
    parser = environments.add_parser(
        "search",
        help="Search-QA: questions about an invented world with its corpus, or from your question files",
        description="Writes train.parquet, validation.parquet, test.parquet and panel.json; without --source also "
        f"{CORPUS_FILE}, which holds the answers. Panels are sorted and hashed: the same options give the same tasks "
        "on any machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--out", required=True, type=given_path, help="folder to write to")
    parser.add_argument(
        "--source",
        nargs="+",
        metavar="[PANEL=]FILE",
        default=argparse.SUPPRESS,
        help="question files, .parquet or .jsonl, as Search-R1, FlashRAG, SkyRL and SDAR make them; PANEL is train, "
        "validation or test, and may be left out when the file's name begins with it",
    )
    parser.add_argument(
        "--generate", action="store_true", help="questions about an invented world: what is done without --source"
    )
    for panel in PANELS:
        of_files = f"all, or {HELD_OUT} held out of training where no file is named" if panel == "validation" else "all"
        parser.add_argument(
            f"--{panel}",
            type=int,
            metavar="N",
            default=argparse.SUPPRESS,
            help=f"tasks of the {panel} panel; default: {GENERATED_COUNTS[panel]} about the invented world; of files, "
            + of_files,
        )
    parser.add_argument("--seed", type=int, default=0, help="of the invented world, and of the choice among questions")
    parser.add_argument(
        "--scale",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help=f"size of the invented world, 1 to {MAX_SCALE}; 1 has 338 passages (default: 1)",
    )
    parser.add_argument(
        "--corpus",
        type=given_path,
        metavar="FILE.jsonl",
        default=argparse.SUPPRESS,
        help="with --source: the corpus that will be searched; it is read whole, and its hash is kept with the panels",
    )
    parser.add_argument("--force", action="store_true", help="replace panels that were made with other options")


def run(arguments: argparse.Namespace) -> int:
    """Make the panels and show them.

    Raises:
        SdarError: an option has no effect beside the others, the corpus is damaged, or see :func:`prepare`.
    """
    given = vars(arguments)
    if "source" in given and arguments.generate:
        raise SdarError("--generate has no effect with --source; leave one of them out")
    if "source" in given and "scale" in given:
        raise SdarError(f"--scale {given['scale']} only has an effect without --source; leave one of them out")
    if "corpus" in given and "source" not in given:
        raise SdarError(f"--corpus {given['corpus']} only has an effect with --source; the invented world has its own")
    source = Source(
        counts={panel: given[panel] for panel in PANELS if panel in given},
        seed=arguments.seed,
        scale=given.get("scale", 1),
        files=tuple(QuestionFile.of(name) for name in given.get("source", ())),
        corpus=check_corpus(Path(given["corpus"]).expanduser()) if "corpus" in given else None,
    )
    show_panels(arguments.out, prepare(source, arguments.out, force=arguments.force))
    return 0
