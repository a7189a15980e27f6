"""Checks what is read from a record: it may be damaged, edited, or somebody else's. What does not fit is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdar_verl.report.distributions import GAP_EDGES, GATE_EDGES, QUANTILES
from sdar_verl.report.layout import RUN_LISTS, SCHEMA, RecordError
from sdar_verl.untrusted import parse_json, shorten

MOST = 1e100
"""Larger numbers are none that a run measures, and their sums overflow."""
MAX_BIN = 100_000

_PLAIN = (str, bool, int, float, type(None))
"""Infinite numbers among them, which are null in a record of ours."""

_LENGTHS = {
    "gap_quantiles": len(QUANTILES),
    "gate_quantiles": len(QUANTILES),
    "gap_histogram": len(GAP_EDGES) - 1,
    "gate_histogram": len(GATE_EDGES) - 1,
}


def is_number(value: Any) -> bool:
    """A finite number that a run can have measured; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST


def step_of(line: Mapping[str, Any]) -> int | None:
    """The line's step; None when it has none."""
    step: Any = line.get("step")
    return int(step) if is_number(step) and 0 <= step == int(step) else None


def numbers_of(data: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The metrics that are numbers, and how many are neither numbers nor null, text, true or false."""
    numbers = {key: value for key, value in data.items() if is_number(value)}
    return numbers, sum(not isinstance(value, _PLAIN) for value in data.values())


def sound_distributions(line: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The parts of a line of ``distributions.jsonl`` that are what they should be, and the names of the others."""
    faulty = [key for key, value in line.items() if not _is_sound(key, value)]
    return {key: value for key, value in line.items() if key not in faulty}, faulty


def read_run_file(path: Path) -> dict[str, Any]:
    """Content of ``run.json``.

    Raises:
        RecordError: it is damaged, or of another schema.
    """
    try:
        run = parse_json(path.read_bytes())
    except ValueError as error:
        raise RecordError(
            f"{path} is damaged ({error}); without it the record cannot be told from another's"
        ) from error
    found = run.get("schema") if isinstance(run, dict) else None
    if found != SCHEMA:
        raise RecordError(
            f"{path} has schema {shorten(found)}, this version reads {SCHEMA}; use the version of sdar-verl "
            "that wrote it" + (f" ({shorten(run['versions'])})" if isinstance(run, dict) and "versions" in run else "")
        )
    _check_run(run, str(path))
    return run


def _check_run(run: Mapping[str, Any], where: str) -> None:
    """Raise a RecordError when a part of ``run.json`` is of another kind."""
    for name in ("settings", "versions", *RUN_LISTS):
        if not isinstance(run.get(name, {}), dict):
            raise RecordError(f"{where} is damaged: {name} is {shorten(run[name])}, not an object")
    for part in RUN_LISTS:
        kinds, what = (_PLAIN, "plain values") if part == "validation" else ((str,), "hashes")
        for name, values in run.get(part, {}).items():
            if not isinstance(values, list) or not all(isinstance(one, kinds) for one in values):
                raise RecordError(
                    f"{where} is damaged: {part}.{shorten(name)} is {shorten(values)}, not a list of {what}"
                )
    arms = run.get("arms", [])
    if not isinstance(arms, list) or not all(isinstance(one, str) for one in arms):
        raise RecordError(f"{where} is damaged: arms is {shorten(arms)}, not a list of names")
    if not isinstance(run.get("started", ""), str):
        raise RecordError(f"{where} is damaged: started is {shorten(run['started'])}, not a time")


def finite(value: float | None) -> float | None:
    """``value``, None where it is not finite: JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def _is_sound(key: str, value: Any) -> bool:
    if key in _LENGTHS:
        return _is_column(value) and len(value) == _LENGTHS[key] and (_is_counts(value) or "histogram" not in key)
    if key in ("by_turn", "by_position"):
        return _are_bins(value, with_width=key == "by_position")
    if key == "reward":
        return isinstance(value, dict) and all(is_number(value.get(name)) for name in ("mean", "std", "episodes"))
    return True


def _is_column(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _is_counts(values: list[float]) -> bool:
    return all(value >= 0 for value in values) and sum(values) > 0


def _are_bins(value: Any, with_width: bool) -> bool:
    if not isinstance(value, dict) or (with_width and not (is_number(value.get("width")) and value["width"] >= 1)):
        return False
    columns = [item for name, item in value.items() if name != "width"]
    if not {"index", "tokens"} <= value.keys() or not all(map(_is_column, columns)):
        return False
    places = all(isinstance(place, int) and 0 <= place < MAX_BIN for place in value["index"])
    return places and len({len(column) for column in columns}) == 1 and all(count > 0 for count in value["tokens"])
