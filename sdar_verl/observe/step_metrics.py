"""A step's own metrics where the step has several parts: one weight sync after several local updates.

verl puts the metrics of the parts together by what their names contain ("min", "max", "sum"), which fits its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

_COUNTS = (
    "sdar/episodes",
    "sdar/failed_episodes",
    "sdar/crashed_episodes",
    "sdar/cut_episodes",
    "sdar/rows",
    "sdar/groups",
    "sdar/groups_of_one",
    "sdar/groups_without_variance",
    "sdar/nonfinite_",
    "sdar/skill_episodes/",
    "sdar/writer/",
)
"""Added up; so is every name that begins with one that ends in a slash or an underscore."""

_RUNNING = ("sdar/skill_queries/",)
"""Counted over the run: the last value is the step's."""

_PER_EPISODE = ("sdar/success", "sdar/score", "sdar/turns")


def step_metrics(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The ``sdar/`` metrics of a step from those of its parts.

    Counts are added, maxima compared, means weighted: those over episodes with the episodes of each part, all others
    with its rows. A part that has no such number (or NaN) has no say in it.

    Args:
        parts: metrics of each part, in order; others than ``sdar/`` are left out.
    """
    names = dict.fromkeys(name for part in parts for name in part if name.startswith("sdar/"))
    return {name: _joined(name, [part for part in parts if _is_number(part.get(name))]) for name in names}


def _joined(name: str, parts: Sequence[Mapping[str, Any]]) -> float:
    values = [float(part[name]) for part in parts]
    if not values:
        return math.nan
    if len(values) == 1 or _is_one_of(name, _RUNNING):
        return values[-1]
    if _is_one_of(name, _COUNTS):
        return sum(values)
    if name.endswith("/max"):
        return max(values)
    weights = [float(part.get("sdar/episodes" if name in _PER_EPISODE else "sdar/rows", 0.0)) for part in parts]
    if not sum(weights):
        return sum(values) / len(values)
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def _is_one_of(name: str, known: Sequence[str]) -> bool:
    return any(name == one or (one[-1] in "/_" and name.startswith(one)) for one in known)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
