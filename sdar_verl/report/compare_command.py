"""``sdar-verl compare``."""

from __future__ import annotations

import argparse
from typing import Any

from sdar_verl.arguments import given_path
from sdar_verl.untrusted import printable


def add_parser(subparsers: Any) -> None:
    """The sub-command and its options."""
    parser = subparsers.add_parser(
        "compare",
        help="runs of several methods and seeds on one panel: success, speed, differences with intervals",
        description="Groups runs by method over their seeds. docs/report.md says what the numbers are.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, or NAME=FOLDER to call its method something else"
    )
    parser.add_argument("--baseline", metavar="NAME", help="the method that the others are compared with")
    parser.add_argument("--arm", help="validation arm (default: the only one, or student)")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="SHARE",
        help="success whose first time is compared (default: the baseline's at the end, else the lowest method's)",
    )
    parser.add_argument(
        "--out", type=given_path, metavar="DIR", help="write comparison.md, comparison.json and comparison.html"
    )
    parser.add_argument("--draws", type=int, default=2000, metavar="N", help="bootstrap samples (default: %(default)s)")
    parser.add_argument("--any-panel", action="store_true", help="compare different or unknown panels all the same")
    parser.add_argument(
        "--any-settings", action="store_true", help="let runs of a method differ in more than seeds, and games differ"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; write the files that were asked for."""
    from sdar_verl.report.compare import load
    from sdar_verl.report.compare_show import as_html, as_json, explain, markdown, rows_of_text
    from sdar_verl.report.estimates import default_threshold, table
    from sdar_verl.report.layout import write_json
    from sdar_verl.report.page import write_page

    if arguments.draws < 100:
        raise ValueError(f"--draws {arguments.draws} is too few for an interval; use 100 or more")
    comparison = load(
        arguments.runs, arm=arguments.arm, any_panel=arguments.any_panel, any_settings=arguments.any_settings
    )
    baseline, threshold = arguments.baseline, arguments.threshold
    if threshold is None:
        threshold = default_threshold(comparison, baseline)
    elif not 0 < threshold <= 1:
        raise ValueError(f"--threshold {threshold} is no share of tasks; give a number above 0 and at most 1")
    rows = table(comparison, baseline, threshold, arguments.draws)
    _print(*rows_of_text(rows, threshold, baseline), explain(comparison, rows))
    if arguments.out is not None:
        what = (comparison, rows, threshold, baseline)
        write_page(arguments.out / "comparison.html", as_html(*what))
        write_page(arguments.out / "comparison.md", markdown(*what))
        write_json(arguments.out / "comparison.json", as_json(*what))
        print(f"{arguments.out}/comparison.html, comparison.md, comparison.json")
    return 0


def _print(head: list[str], cells: list[list[str]], notes: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE, pad_edge=False)
    for title in head:
        shown.add_column(title, justify="left" if title in ("measure", "method") else "right")
    for number, line in enumerate(cells):
        if number and line[0]:
            shown.add_section()
        shown.add_row(*map(printable, line))
    console = Console(highlight=False, markup=False)
    console.print(shown)
    for note in notes:
        console.print(f"- {printable(note)}")
