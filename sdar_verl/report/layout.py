"""Where a run's record lies and what its files are called (docs/report.md describes them)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdar_verl.atomic import write_text_atomically
from sdar_verl.errors import SdarError
from sdar_verl.untrusted import parse_json, shorten

logger = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the record's files; a reader refuses another one."""

RUN_LISTS = ("panels", "contents", "validation")
"""Parts of ``run.json`` that hold, per option, every value that the run had: a resume may change them."""

RECORD = "record"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
DISTRIBUTIONS_FILE = "distributions.jsonl"
WARNINGS_FILE = "warnings.jsonl"
SKILLS_FILE = "skills.jsonl"
OUTCOMES = "outcomes"
TRACES = "traces"

WRITTEN_FILE = "sdar_written.jsonl"
"""Beside the record: answers of ``sdar.context.writer.url`` that were paid for."""


SKILLS = "skills"
"""Beside the record: the bank of each version of a run that learns skills."""


class RecordError(SdarError):
    """A run's folder is not one, or its record cannot be read; the message says what to do."""


def step_file(folder: Path, step: int) -> Path:
    """The Parquet file of one step in ``folder`` (``outcomes`` or ``traces``)."""
    return folder / f"step_{step:08d}.parquet"


def step_files(folder: Path) -> dict[int, Path]:
    """Step -> file, in the order of steps; what others have put beside them is passed over."""
    found = ((path.stem.removeprefix("step_"), path) for path in sorted(folder.glob("step_*.parquet")))
    return {int(step): path for step, path in found if step.isdecimal()}


def find_record(run: Path) -> Path | None:
    """The record of ``run``: the folder itself, its ``record``, or that of its checkpoints; None when there is none."""
    candidates = [run, run / RECORD, run / "checkpoints" / RECORD]
    return next((folder for folder in candidates if (folder / RUN_FILE).is_file()), None)


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add one JSON line in a single write, so that a run that is killed leaves at most its last line unfinished."""
    with path.open("a") as stream:
        stream.write(json.dumps(value) + "\n")


def read_lines(path: Path, faults: list[str] | None = None) -> list[dict[str, Any]]:
    """All complete JSON lines of ``path``; an unfinished last one is left out.

    Args:
        path: the file.
        faults: gets a sentence for each damaged line, which is then left out; None: it raises.

    Raises:
        RecordError: another line than the last is damaged, or one is no JSON object.
    """
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    values = []
    for number, line in enumerate(lines, start=1):
        fault = None
        try:
            value = parse_json(line)
            if not isinstance(value, dict):
                fault = f"{shorten(value)} and no JSON object"
        except ValueError as error:
            if number == len(lines):
                continue
            fault = f"not JSON ({error})"
        if fault is None:
            values.append(value)
        elif faults is None:
            raise RecordError(f"{path}, line {number}, is {fault}; the file was damaged")
        else:
            faults.append(f"{path.name}: line {number} is {fault}; it is left out")
    return values


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file, atomically."""
    write_text_atomically(path, json.dumps(value, indent=1) + "\n")


def keep_steps(path: Path, last: int) -> list[dict[str, Any]]:
    """Rewrite a file of JSON lines without the steps after ``last``, and without damaged lines, of which it warns, and
    lines whose step is no number, which no reader shows; nothing happens when it does not exist.

    Returns:
        What is left.
    """
    if not path.is_file():
        return []
    faults: list[str] = []
    kept = [value for value in read_lines(path, faults) if _until(value, last)]
    for fault in faults:
        logger.warning("%s", fault)
    write_text_atomically(path, "".join(json.dumps(value) + "\n" for value in kept))
    return kept


def _until(line: Mapping[str, Any], last: int) -> bool:
    step = line.get("step")
    return isinstance(step, int | float) and step <= last
