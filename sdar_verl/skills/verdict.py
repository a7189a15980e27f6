"""Whether a learned skill is worth keeping: success with it in the prompt against success without, task by task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from sdar_verl.report.stats import bootstrap
from sdar_verl.skills.skill import Skill

LEAST_TASKS = 10
"""Fewer say nothing of a type. A skill without effect, at success .5, is taken by ten in 5 of a hundred draws, by
twenty in 3."""


@dataclass(frozen=True)
class Verdict:
    """What a panel says of one learned skill.

    Attributes:
        skill: the learned one.
        tasks: of its types in the panel.
        gain: mean over them of success with it minus success without; NaN without tasks.
        low, high: ends of its 95 % interval, the tasks drawn with replacement; NaN with fewer than two.
    """

    skill: Skill
    tasks: int
    gain: float
    low: float
    high: float

    @property
    def taken(self) -> bool:
        """Success rose outside the interval, over enough tasks."""
        return self.tasks >= LEAST_TASKS and self.low > 0

    @property
    def numbers(self) -> dict[str, float | None]:
        """For JSON, which has no NaN."""
        numbers = {"gain": self.gain, "low": self.low, "high": self.high}
        return {name: None if math.isnan(value) else value for name, value in numbers.items()}

    def __str__(self) -> str:
        word = "taken" if self.taken else "left"
        gain = f"{self.gain:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{word}  {self.skill.name}: {gain} over {self.tasks} tasks"


def judge_skill(skill: Skill, tasks: Iterable[str], before: Mapping[str, float], after: Mapping[str, float]) -> Verdict:
    """Compare success on the tasks that a skill is for.

    Args:
        skill: the learned one.
        tasks: names of them.
        before: task -> mean success without the skill.
        after: task -> mean success with it; tasks that are not in both do not count.
    """
    tasks = [task for task in tasks if task in before and task in after]
    if not tasks:
        return Verdict(skill, 0, math.nan, math.nan, math.nan)
    rise = np.array([after[task] - before[task] for task in tasks])
    low, high = math.nan, math.nan
    if len(tasks) > 1:
        low, high = bootstrap(lambda _, chosen: float(rise[chosen].mean()), 1, len(tasks))
    return Verdict(skill, len(tasks), float(rise.mean()), low, high)
