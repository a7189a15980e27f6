"""Table of quick-start runs: success without and with the skill, invalid actions and the internalisation probe.

    python benchmarks/quickstart_table.py --panel PANEL RUN [RUN ...]

A run is a folder with ``metrics.jsonl`` and ``checkpoints/``; the first row is the start policy, from a run that
validated before training.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdar_verl.local import start_policy
from sdar_verl.local.summary import last_checkpoint, probe, read_metrics

COLUMNS = (
    ("success T=1", "sdar-val/student/success"),
    ("T=0.4", "sdar-val/student_t04/success"),
    ("with skill T=1", "sdar-val/teacher/success"),
    ("with skill T=0.4", "sdar-val/teacher_t04/success"),
    ("invalid", "sdar-val/student/invalid_share"),
)


def row(name: str, values: Mapping[str, Any], internalised: float, seconds: float | None) -> str:
    """One line of the Markdown table."""
    cells = [name, *(f"{values[key]:.3f}" for _, key in COLUMNS), f"{internalised:.3f}"]
    return "| " + " | ".join([*cells, "" if seconds is None else f"{seconds:.1f}"]) + " |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--panel", required=True, type=Path, help="the panel that the runs were validated on")
    arguments = parser.parse_args()
    probes = probe(arguments.panel, [start_policy(), *(last_checkpoint(run / "checkpoints") for run in arguments.runs)])

    head = ["run", *(title for title, _ in COLUMNS), "probe", "s/step"]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    starts: dict[str, str] = {}
    lines = []
    for run, internalised in zip(arguments.runs, probes[1:], strict=True):
        records = read_metrics(run / "metrics.jsonl")
        validations = [record for record in records if COLUMNS[0][1] in record["data"]]
        times = [record["data"]["timing_s/step"] for record in records if "timing_s/step" in record["data"]]
        if validations[0]["step"] == 0:
            starts.setdefault("start", row("start policy", validations[0]["data"], probes[0], None))
        lines.append(row(run.name, validations[-1]["data"], internalised, sum(times) / len(times)))
    print("\n".join([*starts.values(), *lines]))


if __name__ == "__main__":
    main()
