"""What looks at a run: metrics, records, warnings, statistics of skills."""

from __future__ import annotations

from typing import Any

from sdar_verl.config import SdarConfig
from sdar_verl.observe.base import Observer


def observers(settings: SdarConfig, config: Any, run: Any) -> list[Observer]:
    """Those that this run's settings ask for, in the order in which they are called; a new one is one line here.

    Args:
        settings: the ``sdar`` node.
        config: verl's whole config.
        run: verl's trainer.
    """
    from sdar_verl.observe.record import RunRecord
    from sdar_verl.observe.skill_learning import SkillLearning
    from sdar_verl.observe.skill_statistics import SkillStatistics, learns
    from sdar_verl.observe.warnings import RunWarnings

    record = RunRecord(settings, config, run)
    found: list[Observer] = [SkillStatistics(settings)] if learns(settings) else []
    found += [record, RunWarnings(settings, record)]
    if settings.skills.learn.every:
        found.append(SkillLearning(settings, run, record.folder))
    return found
