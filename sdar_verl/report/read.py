"""Reads what a run left behind, as much of it as there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from sdar_verl.cloud.ledger import Attempt
from sdar_verl.cloud.ledger import read as read_ledger
from sdar_verl.cloud.store import Store, StoreError
from sdar_verl.report import layout
from sdar_verl.report.checked import is_number, numbers_of, read_run_file, sound_distributions, step_of
from sdar_verl.report.layout import RecordError
from sdar_verl.report.recipe_metrics import recipe_success
from sdar_verl.report.trace import read_trace


@dataclass
class RunData:
    """A run as its folder tells it.

    Attributes:
        folder: what was asked for.
        run: content of ``run.json``; empty when there is no record.
        metrics: step -> metrics, in the order of steps.
        distributions: one per step, in the order of steps.
        outcomes: step -> columns of its validation episodes.
        traces: step -> file.
        warnings: what was warned of.
        skills: verdicts on skills that were written within the run.
        notes: what is missing or could not be read, in plain words.
        faults: those of the notes that say that a file is damaged.
        attempts: the run's ledger.
        success_notes: what validation success is in a recipe of verl's; empty with the text environments.
    """

    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)
    distributions: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[int, dict[str, list[Any]]] = field(default_factory=dict)
    traces: dict[int, Path] = field(default_factory=dict)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    skills: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    success_notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Experiment name, or the folder's."""
        return str(self.run.get("experiment") or self.folder.resolve().name)

    def column(self, key: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric is a number."""
        return [
            (step, float(data[key]))
            for step, data in self.metrics.items()
            if isinstance(data.get(key), (int, float)) and not isinstance(data.get(key), bool)
        ]

    @property
    def training_steps(self) -> list[int]:
        """Steps that trained, not those that only validated."""
        return [step for step, data in self.metrics.items() if "sdar/success" in data or "timing_s/step" in data]

    def arms(self) -> list[str]:
        """Validation arms, in alphabetical order."""
        prefix, suffix = "sdar-val/", "/success"
        names = {key for data in self.metrics.values() for key in data if key.startswith(prefix)}
        return sorted(key[len(prefix) : -len(suffix)] for key in names if key.endswith(suffix))


def read_run(folder: str | Path) -> RunData:
    """Read a run's folder: its record, or only the metrics of verl's file tracker.

    Args:
        folder: the run's folder, its checkpoint folder, the record itself, or a ``.jsonl`` of verl's file tracker.

    Raises:
        RecordError: there is nothing to report on, or the record has another schema version.
    """
    folder = Path(folder)
    if not folder.exists():
        raise RecordError(f"{folder} does not exist; give the folder of a run (trainer.default_local_dir or above it)")
    record = layout.find_record(folder) if folder.is_dir() else None
    if record is None:
        return _from_tracker(folder)
    data = RunData(folder, run=read_run_file(record / layout.RUN_FILE))
    data.metrics = _metrics(record / layout.METRICS_FILE, data.faults)
    data.distributions = _by_step(record / layout.DISTRIBUTIONS_FILE, data.faults)
    data.warnings = _lines(record / layout.WARNINGS_FILE, data.faults, needed=False)
    data.skills = _lines(record / layout.SKILLS_FILE, data.faults, needed=False)
    data.traces = layout.step_files(record / layout.TRACES)
    data.outcomes = _outcomes(record / layout.OUTCOMES, data.faults)
    data.attempts = _attempts(record.parent, data.faults)
    data.faults += _holes(data)
    data.notes += data.faults
    if not data.metrics and not data.traces:
        data.notes.append("The run has not finished a step: there is nothing to draw yet.")
    if not data.traces:
        data.notes.append("No episode was traced. Set sdar.trace.every to see what the teacher said of each token.")
    _recipe(data)
    if not data.arms():
        data.notes.append("No validation was recorded.")
    elif not data.outcomes:
        data.notes.append("No outcomes per task were recorded: validation success has no interval over tasks.")
    return data


def _holes(data: RunData) -> list[str]:
    """What is not there between the first step and the last, and steps without what is told at a step's end."""
    steps, found = data.training_steps, []
    if missing := steps[-1] - steps[0] + 1 - len(steps) if steps else 0:
        gaps = ((one + 1, other - 1) for one, other in pairwise(steps) if other - one > 1)
        shown = [f"{first} to {last}" if last > first else str(first) for first, last in islice(gaps, 10)]
        found.append(f"There are no metrics of {missing} steps: {', '.join(shown)}.")
    timed = {step for step in steps if "timing_s/step" in data.metrics[step]}
    if timed and (cut := [step for step in steps if step not in timed]):
        found.append(
            f"Steps {', '.join(map(str, cut[:10]))} were killed before their end: their seconds and verl's own numbers "
            "are missing, also in sums over the run."
        )
    return found


def _recipe(data: RunData) -> None:
    """Give a run whose validations have verl's own names the arms that everything else reads."""
    if data.arms():
        return
    success, data.success_notes = recipe_success(data.metrics, data.run.get("arms"))
    for step, values in success.items():
        data.metrics[step].update(values)
        columns = data.outcomes.get(step, {})
        if len({*columns.get("task_type", [])}) == 1 and {*columns["acc"]} <= {0.0, 1.0}:
            data.metrics[step] |= {f"sdar-val/{arm}/episodes": n for arm, n in Counter(columns["arm"]).items()}
    data.notes += data.success_notes


def _attempts(folder: Path, notes: list[str]) -> list[Attempt]:
    try:
        return read_ledger(Store(folder), notes.append)
    except StoreError as error:
        notes.append(f"{error}; what the run cost is not shown")
        return []


def episodes(data: RunData, limit: int) -> Iterator[list[dict[str, Any]]]:
    """Traced episodes, each as its turns, at most ``limit``, evenly from all traced steps.

    A trace that cannot be read is left out and noted.
    """
    per_step = max(1, limit // max(1, len(data.traces)))
    steps = list(data.traces)
    if len(steps) > limit:
        steps = [steps[i * (len(steps) - 1) // max(1, limit - 1)] for i in range(limit)]
    for step in steps:
        try:
            turns = read_trace(data.traces[step])
        except RecordError as error:
            data.notes.append(f"{error}")
            continue
        by_episode: dict[str, list[dict[str, Any]]] = {}
        for turn in turns:
            by_episode.setdefault(turn["episode"], []).append(turn)
        yield from list(by_episode.values())[:per_step]


def _from_tracker(folder: Path) -> RunData:
    files = [folder] if folder.is_file() else [folder / layout.METRICS_FILE, *sorted(folder.glob("*.jsonl"))]
    files = [path for path in files if path.is_file() and path.suffix == ".jsonl"]
    if not files:
        raise RecordError(
            f"{folder} holds no record of a run: neither {layout.RECORD}/{layout.RUN_FILE} (written by runs with "
            "trainer.v1.trainer_mode=sdar into trainer.default_local_dir) nor a .jsonl of verl's file tracker"
        )
    data = RunData(folder if folder.is_dir() else folder.parent)
    for file in files:  # others may lie beside the tracker's
        data.faults = []
        data.metrics = _metrics(file, data.faults)
        if data.metrics:
            break
    data.notes += data.faults
    _recipe(data)
    data.notes.append(
        f"Only {file.name} of verl's file tracker was found; distributions, outcomes and traces are in the record "
        "that runs of this version write."
    )
    return data


def _lines(path: Path, notes: list[str], needed: bool = True) -> list[dict[str, Any]]:
    if not path.is_file():
        if needed:
            notes.append(f"{path.name} is missing.")
        return []
    found: list[str] = []
    lines = layout.read_lines(path, found)
    notes += [
        *found[:_SHOWN],
        *([f"{path.name}: {more} more"] if (more := len(found) - _SHOWN) > 0 else []),
    ]
    return lines


_SHOWN = 3
"""Damaged lines of a file that are named one by one."""


def _of_steps(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, line) of a file; lines without a step are counted in the notes."""
    strange = 0
    for line in _lines(path, notes):
        if (step := step_of(line)) is None:
            strange += 1
        else:
            yield step, line
    if strange:
        notes.append(f"{path.name}: {strange} lines have no step and are left out.")


def _by_step(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    latest: dict[int, dict[str, Any]] = {}
    faulty: set[str] = set()
    for step, line in _of_steps(path, notes):
        sound, others = sound_distributions(line)
        latest[step] = {**sound, "step": step}
        faulty.update(others)
    if faulty:
        notes.append(f"{path.name}: {', '.join(sorted(faulty))} of some steps are damaged and left out.")
    return [latest[step] for step in sorted(latest)]


def _metrics(path: Path, notes: list[str]) -> dict[int, dict[str, Any]]:
    steps: dict[int, dict[str, Any]] = {}
    strange = 0
    for step, line in _of_steps(path, notes):
        if isinstance(line.get("data"), dict):
            numbers, others = numbers_of(line["data"])
            steps.setdefault(step, {}).update(numbers)
            strange += others
    if strange:
        notes.append(f"{path.name}: {strange} values are no numbers and left out.")
    return dict(sorted(steps.items()))


def _outcomes(folder: Path, notes: list[str]) -> dict[int, dict[str, list[Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = {}
    for step, path in layout.step_files(folder).items():
        try:
            columns = pq.read_table(path).to_pydict()
            if missing := {"arm", "task_id", "acc"} - columns.keys():
                raise RecordError(f"no column {', '.join(sorted(missing))}")
            columns = {"task_type": [None] * len(columns["acc"]), **columns}
            columns["acc"] = [float(value) if isinstance(value, bool) else value for value in columns["acc"]]
            kept = [row for row, value in enumerate(columns["acc"]) if is_number(value)]
            if strange := len(columns["acc"]) - len(kept):
                notes.append(f"{path.name} of the validation outcomes: {strange} rows have no acc and are left out.")
            found[step] = {name: [values[row] for row in kept] for name, values in columns.items()}
        except (OSError, ValueError, pa.ArrowException, RecordError) as error:
            notes.append(f"{path.name} of the validation outcomes cannot be read ({error}).")
    return found
