"""Which parts a run has: a new part is one line here."""

from __future__ import annotations

from typing import Any

from sdar_verl.config import SdarConfig
from sdar_verl.observe.base import TrainerPart
from sdar_verl.observe.distillation import Distillation
from sdar_verl.observe.packing import PackingCheck
from sdar_verl.observe.record import RunRecord
from sdar_verl.observe.skill_statistics import SkillStatistics, learns
from sdar_verl.observe.warnings import RunWarnings


def make_parts(settings: SdarConfig, config: Any) -> list[TrainerPart]:
    """The parts that this run's settings ask for, in the order in which they are called.

    Args:
        settings: the ``sdar`` node.
        config: verl's whole config.
    """
    parts: list[TrainerPart] = []
    if config.actor_rollout_ref.model.use_remove_padding:
        parts.append(PackingCheck(config))
    if learns(settings):
        parts.append(SkillStatistics(settings))
    if settings.teacher.source != "none":
        parts.append(Distillation(settings, config))
    record = RunRecord(settings, config)
    return [*parts, record, RunWarnings(settings, record)]
