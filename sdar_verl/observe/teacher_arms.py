"""Whether the policy with the context in its prompt solves less than without it, or less than it once did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdar_verl.config import SdarConfig
from sdar_verl.teacher.sources import get_source

STANDARD_ERRORS = 3.0
"""A fall of success, or a teacher below its student, must be larger than this many standard errors."""


class BestOfArms:
    """The best validation of each arm that shows the context: what a teacher that follows the policy once could do.

    Args:
        settings: the ``sdar`` node.

    Attributes:
        best: arm -> (share of the panel solved, its squared standard error, step).
    """

    def __init__(self, settings: SdarConfig):
        source = settings.teacher.source
        follows = settings.loss.coef > 0 and source != "none" and get_source(source).follows
        self._arms = [name for name, arm in settings.validation.arms.items() if follows and arm.context != "none"]
        self.best: dict[str, tuple[float, float, int]] = {}

    def fall(self, step: int, outcomes: Mapping[str, Sequence[Any]]) -> str | None:
        """Say of the first arm that is below its best by more than chance; None where there is none.

        Args:
            step: of the validation.
            outcomes: columns ``arm``, ``task_id`` and ``acc``, one value per episode.
        """
        solved, text = _solved(outcomes), None
        for arm in self._arms:
            shares = list(solved.get(arm, {}).values())
            if len(shares) < 2:
                continue
            share, square = float(np.mean(shares)), float(np.var(shares, ddof=1) / len(shares))
            top, its_square, when = self.best.setdefault(arm, (share, square, step))
            error = float(np.sqrt(square + its_square))
            if share > top:
                self.best[arm] = (share, square, step)
            elif text is None and top - share > STANDARD_ERRORS * error and top > share:
                text = (
                    f"with the teacher's context the policy solves {share:.3f} of the panel, and {top:.3f} at step "
                    f"{when} (arm {arm}, standard error of the difference {error:.3f}): the teacher's weights follow "
                    "the policy, and both get worse together. Lower sdar.loss.coef, or take a teacher that holds "
                    "still (sdar.teacher.source=reference, or ema with a slow average; docs/teachers.md)"
                )
        return text


def worse_teacher(settings: SdarConfig, outcomes: Mapping[str, Sequence[Any]]) -> str | None:
    """Compare arms that show the context with those that do not, at the same temperature, task by task.

    Args:
        settings: its ``validation.arms`` say which is which.
        outcomes: columns ``arm``, ``task_id`` and ``acc``, one value per episode.
    """
    solved, arms = _solved(outcomes), settings.validation.arms
    for name, arm in arms.items():
        for other, plain in arms.items():
            if arm.context == "none" or plain.context != "none" or arm.temperature != plain.temperature:
                continue
            tasks = sorted(solved.get(name, {}).keys() & solved.get(other, {}).keys())
            if len(tasks) < 2:
                continue
            differences = np.array([solved[name][task] - solved[other][task] for task in tasks])
            error = differences.std(ddof=1) / np.sqrt(len(tasks))
            if differences.mean() < -STANDARD_ERRORS * error and differences.mean() < 0:
                return (
                    f"with the teacher's context the policy solves {-differences.mean():.3f} less of the panel than "
                    f"without it (arms {name} and {other}, {len(tasks)} tasks, standard error {error:.3f}): what the "
                    "teacher is shown misleads it, and distilling it will, too. Check the texts (sdar.skills.bank), "
                    "their choice (sdar.skills.retrieval) and that the prompt is one this model can read "
                    "(sdar.prompt.template)"
                )
    return None


def _solved(outcomes: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, float]]:
    """Arm -> task -> share of its episodes that solved it; empty where outcomes per task are missing."""
    if not {"arm", "task_id", "acc"} <= set(outcomes):
        return {}
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for arm, task, acc in zip(outcomes["arm"], outcomes["task_id"], outcomes["acc"], strict=True):
        if task is not None:
            found[arm][task].append(float(acc))
    return {arm: {task: float(np.mean(accs)) for task, accs in tasks.items()} for arm, tasks in found.items()}
