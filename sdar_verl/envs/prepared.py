"""What every environment's ``prepare`` shares: its outcome, and panels that are there already."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sdar_verl.panels import PanelError, read_panels_file


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


def finished_panels(out: str | Path, settings: Mapping[str, Any], *, force: bool) -> Prepared | None:
    """The panels in ``out`` when they were made with these ``settings``; None when there are none, or ``force``.

    Raises:
        PanelError: there are panels of other settings, or ``out`` is no folder.
    """
    if Path(out).exists() and not Path(out).is_dir():
        raise PanelError(f"--out {out} is a file; name a folder, which is made when it is not there")
    existing = None if force else read_panels_file(out)
    if existing is None:
        return None
    if existing["settings"] == settings:
        return Prepared(existing, made=False, skipped={})
    raise PanelError(
        f"{out} holds panels made with other settings ({_differences(existing['settings'], settings)}); "
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
