"""Groups runs by method, and refuses what cannot be compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdar_verl.errors import SdarError
from sdar_verl.report import layout
from sdar_verl.report.layout import RecordError
from sdar_verl.report.read import RunData, read_run

SEED_OPTIONS = ("data.seed", "sdar.rollout.seed", "actor_rollout_ref.actor.data_loader_seed")
"""What may differ between runs of one method."""

TASK_OPTIONS = ("sdar.env.", "sdar.prompt.", "sdar.rollout.history")
"""Prefixes of options that change the task itself, not the method."""

_ARMS = "sdar.validation.arms."
_SEED_SUFFIX = re.compile(r"[-_.]?(?:seed|s)?[-_]?\d+$")


class ComparisonError(SdarError):
    """Runs that say nothing about each other; names what differs and the option that compares them anyway."""


@dataclass
class Group:
    """Runs of one method.

    Attributes:
        name: of the method.
        runs: one per seed.
        steps: (validations,) steps at which all runs of the comparison were validated.
        success: (runs, validations, tasks), share of a task's rollouts that solved it; NaN in ``tasks`` when the runs
            kept no outcomes: then there is one column, the share over the panel.
        tokens: (runs, validations), trained and generated so far.
        seconds: (runs, validations), of training steps so far, without validation.
    """

    name: str
    runs: list[RunData]
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0))
    success: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    seconds: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def sort(self) -> None:
        """Runs by their seeds, whichever was named first; methods of the same seeds are paired by their places."""
        self.runs.sort(key=lambda run: [seed if isinstance(seed, int) else -1 for seed in _run_seeds(run)])

    @property
    def seeds(self) -> list[Any]:
        """What tells the runs of the method apart: their seeds, or their places in the list."""
        found = [_run_seeds(run) for run in self.runs]
        return list(found) if len(set(found)) == len(found) else list(range(len(self.runs)))


def _run_seeds(run: RunData) -> tuple[Any, ...]:
    """The run's :data:`SEED_OPTIONS`; None for one that its record does not tell."""
    return tuple(run.run.get("settings", {}).get(option) for option in SEED_OPTIONS)


@dataclass
class Comparison:
    """All groups over the same tasks and steps.

    Attributes:
        groups: in the order in which their runs were given.
        arm: the validation arm that is compared.
        tasks: ids of the tasks; empty when outcomes are missing.
        notes: what a reader must know to read the numbers right.
    """

    groups: list[Group]
    arm: str
    tasks: list[str]
    notes: list[str]

    def group(self, name: str) -> Group:
        """The method called ``name``. ComparisonError that lists the known."""
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(group.name for group in self.groups)
        raise ComparisonError(f"no method is called {name!r}; found: {known}")


def load(
    specs: Sequence[str], *, arm: str | None = None, any_panel: bool = False, any_settings: bool = False
) -> Comparison:
    """Read the runs and put them side by side.

    Args:
        specs: folders of runs, or ``METHOD=FOLDER``; a folder that exists is one, whatever its name holds.
        arm: validation arm; None: the only one, or ``student``.
        any_panel: compare runs of different, or unknown, panels and tasks all the same.
        any_settings: let runs of one method differ in more than their seeds.

    Raises:
        ComparisonError: the runs are not of one panel, or not of one kind; no common arm or validation.
        RecordError: a folder holds no run.
    """
    groups: dict[str, Group] = {}
    seen: set[Path] = set()
    for spec in specs:
        name, run = _read(spec)
        place = (layout.find_record(run.folder) or run.folder).resolve()
        if place in seen:
            raise ComparisonError(f"{run.folder} is named twice; a run counts once")
        seen.add(place)
        groups.setdefault(name, Group(name, [])).runs.append(run)
    listed = list(groups.values())
    for group in listed:
        group.sort()
    runs = [run for group in listed for run in group.runs]
    notes = [f"{run.folder}: {fault}" for run in runs for fault in run.faults]
    _check_panels(runs, any_panel, notes)
    arm = _arm(runs, arm)
    for group in listed:
        _check_settings(group, arm, any_settings, notes)
    _check_methods(listed, arm, any_settings, notes)
    if untold := sum("validation" not in run.run for run in runs if run.run):
        notes.append(
            f"{untold} of {len(runs)} runs were recorded by an earlier version, which does not tell how the arm "
            f"{arm} was sampled: it is taken as equal."
        )
    if len({str(group.seeds) for group in listed}) > 1:
        notes.append("Not all methods were run with the same seeds; differences between those are not paired by seed.")
    for text in dict.fromkeys(text for run in runs for text in run.success_notes):
        where = [str(run.folder) for run in runs if text in run.success_notes]
        notes.append(text if len(where) == len(runs) else f"{', '.join(where)}: {text}")
    comparison = Comparison(listed, arm, [], notes)
    _fill(comparison, any_panel)
    return comparison


def _read(spec: str) -> tuple[str, RunData]:
    name, separator, folder = spec.partition("=")
    if not separator or Path(spec).exists():  # Hydra calls folders lr=1e-4
        name, folder = "", spec
    elif not Path(folder).exists():
        raise RecordError(f"{spec}: neither {spec} nor {folder} exists; give a run's folder, or METHOD=FOLDER")
    run = read_run(folder)
    return name or method_of(run), run


def method_of(run: RunData) -> str:
    """The run's method: ``sdar.method``, else its experiment's name without a seed at the end, else its folder's.

    A run whose teacher saw a placebo is a method of its own, ``<method>+<control>``.
    """
    name = str(run.run.get("method") or _SEED_SUFFIX.sub("", run.name) or run.name)
    settings = run.run.get("settings", {})
    control = settings.get("sdar.context.control", "none")
    if control == "none" or settings.get("sdar.teacher.source") == "none" or name.endswith(f"+{control}"):
        return name
    return f"{name}+{control}"


def _panels(run: RunData) -> tuple[str, ...] | None:
    panels = run.run.get("panels", {}).get("val_files")
    return tuple(panels) if panels else None


def _check_panels(runs: Sequence[RunData], any_panel: bool, notes: list[str]) -> None:
    unknown = [run for run in runs if _panels(run) is None]
    hashes = {_panels(run) for run in runs} - {None}
    faults = []
    if unknown:
        folders = ", ".join(str(run.folder) for run in unknown)
        faults.append(f"the validation panel of {folders} is unknown, because the run left no record")
    if len(hashes) > 1:
        which = "; ".join(f"{run.folder}: {', '.join(h[:12] for h in _panels(run) or ('unknown',))}" for run in runs)
        faults.append(f"the runs were validated on different panels ({which})")
    if faults and not any_panel:
        raise ComparisonError(
            f"{'; '.join(faults)}. Success on different tasks cannot be compared; --any-panel does it all the same"
        )
    notes += [f"{fault[0].upper()}{fault[1:]}." for fault in faults]


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    names = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    return [f"{name} ({one.get(name)!r}, {other.get(name)!r})" for name in names]


def _settings(run: RunData) -> dict[str, Any]:
    settings = run.run.get("settings", {})
    return {name: value for name, value in settings.items() if name not in SEED_OPTIONS}


def _check_settings(group: Group, arm: str, any_settings: bool, notes: list[str]) -> None:
    first = group.runs[0]
    for run in group.runs[1:]:
        found = _differences(_settings(first), _settings(run)) if run.run and first.run else []
        if found := [*found, *_differing_contents(first, run, arm)]:
            text = (
                f"runs of {group.name} differ in more than their seeds: {', '.join(found)} in {first.folder} and "
                f"{run.folder}"
            )
            if not any_settings:
                raise ComparisonError(
                    f"{text}. Name them as methods of their own (NAME={run.folder}), or take them together with "
                    "--any-settings"
                )
            notes.append(f"{text[0].upper()}{text[1:]}.")
    if (
        len(group.runs) > 1
        and len({*map(str, group.seeds)}) == len(group.runs)
        and group.seeds == [*range(len(group.runs))]
    ):
        notes.append(f"The seeds of {group.name} are unknown or equal; its runs are taken as different seeds.")


def _check_methods(groups: Sequence[Group], arm: str, any_settings: bool, notes: list[str]) -> None:
    first = groups[0].runs[0]
    for group in groups[1:]:
        run = group.runs[0]
        one, other = (
            {name: value for name, value in _settings(r).items() if name.startswith(TASK_OPTIONS)} for r in (first, run)
        )
        if one and other and (found := _differences(one, other)):
            text = f"{groups[0].name} and {group.name} do not play the same game: {', '.join(found)}"
            if not any_settings:
                raise ComparisonError(f"{text}. --any-settings compares them all the same")
            notes.append(f"{text[0].upper()}{text[1:]}.")
        if found := _differing_contents(first, run, arm):
            notes.append(f"{groups[0].name} and {group.name} differ in more than their settings: {', '.join(found)}.")


def _differing_contents(one: RunData, other: RunData, arm: str) -> list[str]:
    """What the settings do not tell: files that were read, how the arm was validated. What one run of an earlier
    version does not tell is no difference."""
    parts: list[dict[str, Any]] = []
    for run in (one, other):
        hashes = {"data.train_files": run.run.get("panels", {}).get("train_files"), **run.run.get("contents", {})}
        contents = {
            f"the content of {option}": [digest[:12] for digest in found] for option, found in hashes.items() if found
        }
        validation = {
            option: values
            for option, values in run.run.get("validation", {}).items()
            if not option.startswith(_ARMS) or option.startswith(f"{_ARMS}{arm}.")
        }
        parts.append(contents | validation)
    common = parts[0].keys() & parts[1].keys()
    return _differences(*({name: part[name] for name in common} for part in parts))


def _arm(runs: Sequence[RunData], arm: str | None) -> str:
    common = set.intersection(*(set(run.arms()) for run in runs))
    if arm is not None:
        missing = [str(run.folder) for run in runs if arm not in run.arms()]
        if missing:
            raise ComparisonError(
                f"no validation of the arm {arm!r} in {', '.join(missing)}; all have: {sorted(common)}"
            )
        return arm
    if not common:
        without = [f"{run.folder} ({'; '.join(run.faults) or 'it never validated'})" for run in runs if not run.arms()]
        raise ComparisonError(
            f"no validation in {', '.join(without)}"
            if without
            else "the runs have no validation arm in common (sdar.validation.arms): "
            + ", ".join(f"{run.folder} has {', '.join(run.arms())}" for run in runs)
        )
    if len(common) == 1:
        return common.pop()
    if "student" in common:
        return "student"
    raise ComparisonError(f"choose a validation arm with --arm: {', '.join(sorted(common))}")


def _fill(comparison: Comparison, any_panel: bool) -> None:
    runs = [run for group in comparison.groups for run in group.runs]
    key = f"sdar-val/{comparison.arm}/success"
    per_run = [[step for step, _ in run.column(key)] for run in runs]
    steps = sorted(set.intersection(*map(set, per_run)))
    if not steps:
        raise ComparisonError(f"the runs share no step at which the arm {comparison.arm} was validated")
    if any(set(own) != set(steps) for own in per_run):
        comparison.notes.append(
            f"Runs were validated at different steps; only the common ones count: {', '.join(map(str, steps))}."
        )
    tables = [[_by_task(run, step, comparison.arm) for step in steps] for run in runs]
    whole = [at for at in range(len(steps)) if all(row[at] for row in tables)]
    if whole and len(whole) < len(steps):
        lost = [
            f"{run.folder} at step {steps[at]}"
            for run, row in zip(runs, tables, strict=True)
            for at in range(len(steps))
            if not row[at]
        ]
        comparison.notes.append(f"Outcomes per task are missing, and these steps left out: {', '.join(lost)}.")
        steps, tables = [steps[at] for at in whole], [[row[at] for at in whole] for row in tables]
    sets = [set(table) for row in tables for table in row] if whole else []
    common = sorted(set.intersection(*sets)) if sets else []
    if any(own != set(common) for own in sets):
        text = f"validations did not hold the same tasks: {len(common)} of up to {max(map(len, sets))} are common"
        if not any_panel:
            raise ComparisonError(f"{text}; --any-panel compares those")
        comparison.notes.append(f"{text[0].upper()}{text[1:]}{'; only those count' if common else ''}.")
    if not common:
        comparison.notes.append(
            "Outcomes per task are missing, or of several data sources, or of different tasks, so that differences are "
            "not paired task by task and intervals rest on the seeds alone."
        )
    comparison.tasks = common
    rows = iter(tables)
    for group in comparison.groups:
        group.steps = np.array(steps, dtype=float)
        values, tokens, seconds = [], [], []
        for run in group.runs:
            shares, table = dict(run.column(key)), next(rows)
            values.append(
                [
                    [cell[task] for task in common] if common else [shares[s]]
                    for s, cell in zip(steps, table, strict=True)
                ]
            )
            tokens.append(_running(run, "perf/total_num_tokens", steps))
            seconds.append(_running(run, "timing_s/step", steps))
        group.success = np.array(values, dtype=float)
        group.tokens, group.seconds = np.array(tokens), np.array(seconds)


def _by_task(run: RunData, step: int, arm: str) -> dict[str, float]:
    """Task -> share of its rollouts that solved it."""
    columns = run.outcomes.get(step)
    if columns is None or (run.success_notes and len({*columns["task_type"]}) > 1):
        return {}  # of several data sources verl's mean counts, in which each weighs the same
    found: dict[str, list[float]] = {}
    for name, task, acc in zip(columns["arm"], columns["task_id"], columns["acc"], strict=True):
        if name == arm and task is not None:
            found.setdefault(task, []).append(float(acc))
    return {task: sum(values) / len(values) for task, values in found.items()}


def _running(run: RunData, key: str, steps: Sequence[int]) -> list[float]:
    column = run.column(key)
    if not column:
        return [np.nan] * len(steps)
    return [sum(value for step, value in column if step <= last) for last in steps]
