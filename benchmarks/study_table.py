"""Table of methods over seeds in the quick start's recipe, as in docs/study.md.

    python benchmarks/study_table.py --panel PANEL RUN [RUN ...]

Runs are folders as `sdar-verl sweep` makes them, validated on PANEL after the last step. Success has a 95 % bootstrap
interval over runs and tasks; probe and share of invalid actions have their range over the seeds. A second table has
the student's success seed by seed, and the lines after it are the differences to --baseline, paired by task and, where
the seeds agree, by seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdar_verl.local import start_policy
from sdar_verl.local.summary import last_checkpoint, probe
from sdar_verl.report.compare import Group, load
from sdar_verl.report.estimates import difference, estimate, measures

ARMS = {"student": "success T=1", "student_t04": "T=.4", "teacher": "with the skill T=1", "teacher_t04": "T=.4"}
FINAL = measures(0.5)[0]


def spread(values: list[float]) -> str:
    """Mean, and the range when there are several."""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def last_value(group: Group, name: str) -> list[float]:
    """A metric of the last validation of each run."""
    return [run.column(name)[-1][1] for run in group.runs]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--panel", required=True, type=Path, help="the panel that the runs were validated on")
    parser.add_argument("--baseline", help="of the differences; none without")
    arguments = parser.parse_args()
    arms = {arm: load(arguments.runs, arm=arm, any_settings=True) for arm in ARMS}
    if arguments.baseline is not None:
        arms["student"].group(arguments.baseline)  # told before the checkpoints are loaded
    listed = arms["student"].groups
    folders = [run.folder for group in listed for run in group.runs]
    probes = probe(arguments.panel, [start_policy(), *(last_checkpoint(folder / "checkpoints") for folder in folders)])
    probe_of = dict(zip(folders, probes[1:], strict=True))

    print("| method | seeds | " + " | ".join(ARMS.values()) + " | invalid | probe |")
    print("|" + "---|" * (len(ARMS) + 4))
    for place, group in enumerate(listed):
        cells = []
        for comparison in arms.values():
            found = estimate(comparison.groups[place], FINAL)
            cells.append(f"{found.value:.3f} [{found.low:.2f}, {found.high:.2f}]")
        invalid = spread(last_value(group, "sdar-val/student/invalid_share"))
        internalised = spread([probe_of[run.folder] for run in group.runs])
        print("| " + " | ".join([f"`{group.name}`", str(len(group.runs)), *cells, invalid, internalised]) + " |")
    print(f"\nstart policy: probe {probes[0]:.3f}\n")
    students = {arm: title for arm, title in ARMS.items() if arm.startswith("student")}
    print("| method | " + " | ".join(students.values()) + " |\n" + "|---" * (len(students) + 1) + "|")
    for group in listed:
        values = [last_value(group, f"sdar-val/{arm}/success") for arm in students]
        by_seed = [", ".join(f"{value:.3f}" for value in of_arm) for of_arm in values]
        print("| " + " | ".join([f"`{group.name}`", *by_seed]) + " |")
    print()
    for arm, comparison in arms.items() if arguments.baseline is not None else ():
        reference = comparison.group(arguments.baseline)
        for group in comparison.groups:
            if group is not reference:
                found = difference(group, reference, FINAL)
                note = ", within noise" if found.within_noise else ""
                interval = f"[{found.low:+.2f}, {found.high:+.2f}]"
                print(f"{arm}: {group.name} - {reference.name} {found.value:+.3f} {interval}{note}")


if __name__ == "__main__":
    main()
