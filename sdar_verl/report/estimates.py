"""Numbers of a comparison: per method with a bootstrap interval, and against a baseline task by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdar_verl.report.compare import Comparison, Group
from sdar_verl.report.cost import Cost, cost
from sdar_verl.report.stats import area_under_curve, bootstrap, first_reach

Curve = Sequence[float]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval; NaN where there is none, or it is unknown, infinite what is never
    reached.

    Attributes:
        value: the mean over runs.
        low, high: ends of the interval.
        reached: for times to a threshold, the number of runs that reach it; None where that time of a run is unknown.
    """

    value: float
    low: float
    high: float
    reached: int | None = None

    @property
    def within_noise(self) -> bool:
        """Of a difference: 0 lies in the interval, or there is no interval."""
        return not (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Measure:
    """A quantity of a run's curve.

    Attributes:
        key: its name in JSON.
        title: its name in tables.
        share: it is a share, shown in per cent; else a count.
        of: (success at the validations, where they are on the axis) -> number.
        axis: ``steps``, ``tokens`` or ``seconds``.
        of_baseline: what of the baseline's curve it is compared with; None: the same.
    """

    key: str
    title: str
    share: bool
    of: Callable[[Curve, Curve], float]
    axis: str = "steps"
    of_baseline: Callable[[Curve, Curve], float] | None = None


def measures(threshold: float) -> list[Measure]:
    """All quantities; times are those at which ``threshold`` is reached first."""

    def reach(curve: Curve, places: Curve) -> float:
        return first_reach(places, curve, threshold)

    def final(curve: Curve, _: Curve) -> float:
        return float(curve[-1])

    def halfway(curve: Curve, places: Curve) -> float:
        return next((float(curve[i]) for i in reversed(range(len(places))) if places[i] <= places[-1] / 2), math.nan)

    return [
        Measure("final", "success at the end", True, final),
        Measure("halfway", "success halfway (less the baseline's at the end)", True, halfway, of_baseline=final),
        Measure("best", "best success", True, lambda curve, _: float(max(curve))),
        Measure("area", "mean over training", True, lambda curve, places: area_under_curve(places, curve)),
        Measure("steps", f"steps to {threshold:.0%}", False, reach),
        Measure("tokens", f"tokens to {threshold:.0%}", False, reach, "tokens"),
        Measure("seconds", f"seconds to {threshold:.0%}", False, reach, "seconds"),
    ]


def default_threshold(comparison: Comparison, baseline: str | None) -> float:
    """The baseline's mean success at the end, or the lowest method's: how soon do the others get there? A method that
    ends at 0, where everybody begins, is no measure: then the lowest of the others."""
    groups = [*([comparison.group(baseline)] if baseline else []), *comparison.groups]
    ends = [float(group.success[:, -1].mean()) for group in groups]
    return ends[0] if baseline and ends[0] else min(filter(None, ends), default=1.0)


def estimate(group: Group, measure: Measure, draws: int = 2000) -> Estimate:
    """The method's mean over runs, runs and tasks drawn with replacement."""
    points = _per_run(group, measure, np.arange(group.success.shape[2]))
    reached = None if measure.share or np.isnan(points).any() else int(np.isfinite(points).sum())
    runs, tasks = group.success.shape[0], group.success.shape[2]
    if (tasks == 1 and runs == 1) or not np.isfinite(points).all():
        return Estimate(float(points.mean()), math.nan, math.nan, reached)

    def statistic(drawn: np.ndarray, chosen: np.ndarray) -> float:
        return float(_per_run(group, measure, chosen)[drawn].mean())

    return Estimate(float(points.mean()), *bootstrap(statistic, runs, tasks, draws=draws), reached)


def difference(group: Group, baseline: Group, measure: Measure, draws: int = 2000) -> Estimate:
    """Method minus baseline: the same tasks are drawn for both, and the same seeds where both have the same ones."""
    tasks = np.arange(group.success.shape[2])
    of_baseline = replace(measure, of=measure.of_baseline or measure.of)
    ours, theirs = _per_run(group, measure, tasks), _per_run(baseline, of_baseline, tasks)
    value = float(ours.mean()) - float(theirs.mean())
    runs = len(ours), len(theirs)
    if not np.isfinite([*ours, *theirs]).all() or (len(tasks) == 1 and min(runs) == 1):
        return Estimate(value, math.nan, math.nan)
    paired = runs[0] == runs[1] and group.seeds == baseline.seeds
    generator = np.random.default_rng(1)

    def statistic(drawn: np.ndarray, chosen: np.ndarray) -> float:
        others = drawn if paired else generator.integers(0, runs[1], runs[1])
        ours, theirs = _per_run(group, measure, chosen)[drawn], _per_run(baseline, of_baseline, chosen)[others]
        return float(ours.mean()) - float(theirs.mean())

    return Estimate(value, *bootstrap(statistic, runs[0], len(tasks), draws=draws))


def _per_run(group: Group, measure: Measure, tasks: np.ndarray) -> np.ndarray:
    """(runs,) the measure of each run over these tasks; infinite where a threshold is not reached."""
    curves = group.success[:, :, tasks].mean(axis=2)
    places = {
        "steps": np.broadcast_to(group.steps, curves.shape),
        "tokens": group.tokens,
        "seconds": group.seconds,
    }[measure.axis]
    return np.array([measure.of(curve, place) for curve, place in zip(curves, places, strict=True)])


@dataclass(frozen=True)
class Row:
    """One method of the table.

    Attributes:
        method: its name.
        runs: number of runs.
        values: key of a measure -> estimate.
        differences: the same for the difference to the baseline; empty for the baseline itself and without one.
        cost: by the runs' ledgers.
    """

    method: str
    runs: int
    values: dict[str, Estimate]
    differences: dict[str, Estimate]
    cost: Cost


def table(comparison: Comparison, baseline: str | None, threshold: float, draws: int = 2000) -> list[Row]:
    """All methods, all measures."""
    reference = comparison.group(baseline) if baseline else None
    listed = measures(threshold)
    return [
        Row(
            group.name,
            len(group.runs),
            {measure.key: estimate(group, measure, draws) for measure in listed},
            {}
            if reference is None or group is reference
            else {measure.key: difference(group, reference, measure, draws) for measure in listed},
            cost(group),
        )
        for group in comparison.groups
    ]
