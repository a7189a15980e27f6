"""``sdar-verl report``."""

from __future__ import annotations

import argparse
from typing import Any

from sdar_verl.arguments import given_path
from sdar_verl.untrusted import printable


def add_parser(subparsers: Any) -> None:
    """The sub-command and its options."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML file about a run: curves, gaps, gates, and episodes token by token",
        description="Writes one self-contained HTML file that opens from disk. docs/report.md says what it shows.",
    )
    parser.add_argument(
        "run_dir", type=given_path, metavar="RUN_DIR", help="the run's folder (or its checkpoint folder)"
    )
    parser.add_argument("--out", type=given_path, metavar="FILE", help="default: RUN_DIR/report.html")
    parser.add_argument(
        "--episodes", type=int, default=200, metavar="N", help="traced episodes to show, evenly from all traced steps"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report and say where it is and what it lacks."""
    from sdar_verl.report.document import write_report

    if arguments.episodes < 0:
        raise ValueError(f"--episodes {arguments.episodes} is negative; 0 leaves the episode viewer out")
    out, notes = write_report(arguments.run_dir, arguments.out, arguments.episodes)
    for note in notes:
        print(f"note: {printable(note)}")
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0
