"""Intervals: Wilson's for shares, bootstrap for everything that is paired or pooled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


def wilson(successes: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; the whole of [0, 1] without trials."""
    if trials <= 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z * Z / trials
    centre = share + z2 / 2
    spread = Z * math.sqrt(max(0.0, share * (1 - share)) / trials + z2 / (4 * trials))
    return max(0.0, (centre - spread) / (1 + z2)), min(1.0, (centre + spread) / (1 + z2))


def mean_interval(mean: float, std: float, count: float) -> tuple[float, float]:
    """Normal 95 % interval of a mean."""
    spread = Z * std / math.sqrt(count) if count > 0 else 0.0
    return mean - spread, mean + spread


def bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    seeds: int,
    tasks: int,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile 95 % interval, both runs (seeds) and tasks drawn with replacement.

    Training runs and panel tasks are both samples of what a method could meet. With one run only the tasks vary, and
    the interval says nothing about another seed.

    Args:
        statistic: (indices of runs, indices of tasks) -> number. A draw may be infinite (a time that never comes), and
            so may a bound; NaN, a difference of two such, may lie anywhere and widens both ends.
        seeds: number of runs.
        tasks: number of tasks; 0: the statistic does not use them.
        draws: bootstrap samples.
        seed: of the generator.

    Returns:
        NaN twice when no draw gave a number.
    """
    generator = np.random.default_rng(seed)
    values = np.array(
        [
            statistic(generator.integers(0, seeds, seeds), generator.integers(0, max(tasks, 1), tasks))
            for _ in range(draws)
        ]
    )
    unknown = np.isnan(values)
    if unknown.all():
        return math.nan, math.nan
    at = round(0.025 * (draws - 1))
    lowest, highest = (np.sort(np.where(unknown, extreme, values)) for extreme in (-math.inf, math.inf))
    return float(lowest[at]), float(highest[-1 - at])


def area_under_curve(steps: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of the curve between its first and its last point (trapezoids); one point: its value."""
    if len(steps) < 2:
        return float(values[0]) if len(values) else math.nan
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum() / (x[-1] - x[0]))


def first_reach(steps: Sequence[float], values: Sequence[float], threshold: float) -> float:
    """Where the curve first reaches ``threshold``, linear between points; infinite when it never does."""
    for i, value in enumerate(values):
        if value >= threshold:
            if i == 0 or values[i - 1] == value:
                return float(steps[i])
            share = (threshold - values[i - 1]) / (value - values[i - 1])
            return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return math.inf
