"""What every environment's ``prepare`` shares: its outcome, and panels that are there already."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sdar_verl.atomic import remove
from sdar_verl.envs.base import Task
from sdar_verl.panels import PanelError, missing_files, read_panel, read_panels_file


@dataclass(frozen=True)
class Prepared:
    """Outcome of a ``prepare``.

    Attributes:
        described: content of ``panel.json``.
        made: False when finished panels with the same settings were there.
        skipped: panel -> reason -> what was left out.
        notes: what the user should know.
    """

    described: Mapping[str, Any]
    made: bool
    skipped: Mapping[str, Counter[str]]
    notes: tuple[str, ...] = ()


def check_counts(counts: Mapping[str, int]) -> None:
    """Raise a PanelError for a panel of no tasks.

    Args:
        counts: panel -> tasks asked for.
    """
    for panel, count in counts.items():
        if count < 1:
            raise PanelError(f"--{panel} {count}: ask for at least one task")


def prepare_panels(
    out: Path,
    settings: Mapping[str, Any],
    make: Callable[[], Prepared],
    *,
    force: bool,
    fits: Callable[[Sequence[Task]], bool] = lambda tasks: True,
    places: Sequence[str] = (),
) -> Prepared:
    """The panels in ``out`` where they were made with these ``settings`` and nothing of them is missing, else new ones.

    Args:
        out: folder; made when missing.
        settings: what decides which tasks the panels hold.
        make: makes them; one call at a time works in a folder.
        force: make them anew in any case.
        fits: whether what lies beside the panels in ``out`` is there, and what these tasks were made with.
        places: settings that say where the tasks come from, not what they are: where panels are not whole, these may
            differ.

    Raises:
        PanelError: there are panels of other settings, ``out`` is no folder, or another call is at work there.
    """
    if out.exists() and not out.is_dir():
        raise PanelError(f"--out {out} is a file; name a folder, which is made when it is not there")
    finished = None if force else _finished(out, settings, fits, places)
    if finished is not None:
        return finished
    with _alone(out):
        finished = None if force else _finished(out, settings, fits, places)  # by the call that was at work until now
        return finished or make()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Lock the folder, which is made; one that was made here goes again where nothing came into it."""
    made_here, path = not out.exists(), out / ".prepare.lock"
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout as error:
        raise PanelError(
            f"--out {out}: another `sdar-verl prepare` is at work there; wait for it, or use another folder"
        ) from error
    finally:
        if made_here and [*out.iterdir()] == [path]:
            remove(out)


def _finished(
    out: Path, settings: Mapping[str, Any], fits: Callable[[Sequence[Task]], bool], places: Sequence[str]
) -> Prepared | None:
    existing = read_panels_file(out)
    if existing is None:
        return None
    files = [out / panel["file"] for panel in existing["panels"].values()]
    # Moved since, or deleted: the same settings give the same tasks, where they lie now.
    try:
        panels = [read_panel(file) for file in files if file.is_file()]
        tasks = [task for panel in panels for task in panel]
        whole = len(panels) == len(files) and not missing_files(tasks) and fits(tasks)
    except PanelError as error:
        raise PanelError(f"{error}; --force makes all of {out} anew") from error
    there = dict(existing["settings"])
    if not whole:
        there |= {name: settings[name] for name in places if name in there and name in settings}
    if there == settings:
        return Prepared(existing, made=False, skipped={}) if whole else None
    raise PanelError(
        f"{out} holds panels made with other settings ({_differences(there, settings)}); "
        "use another --out, or --force to replace them"
    )


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions, for the record in ``panel.json``."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def show_panels(out: str, outcome: Prepared) -> None:
    """Print what a ``prepare`` left in ``out``; notes go to standard error."""
    print(f"{out}: {'made' if outcome.made else 'nothing to do, these panels are there already'}")
    for panel, described in outcome.described["panels"].items():
        print(f"  {described['file']:<20} {described['tasks']:>5} tasks  hash {described['hash'][:16]}")
        for task_type, number in described["task_types"].items():
            print(f"    {number:>5} {task_type}")
        for reason, number in sorted(outcome.skipped.get(panel, {}).items()):
            print(f"    {number:>5} left out: {reason}")
    for note in outcome.notes:
        print(f"note: {note}", file=sys.stderr)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    flat_old, flat_new = _flat(old), _flat(new)
    return ", ".join(
        f"{key}: {flat_old.get(key, 'not set')} there, {flat_new.get(key, 'not set')} asked for"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
