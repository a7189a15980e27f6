"""Keeps what retrieval rules that learn (``ucb``) read: rewards per skill and task type, over the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sdar_verl.config import SdarConfig
from sdar_verl.observe.base import Observer
from sdar_verl.rollout.rows import EVIDENCE_COLUMN, RowInfo
from sdar_verl.skills.registry import get_rule
from sdar_verl.skills.retrieval import RetrievalError
from sdar_verl.skills.ucb import Evidence, TypeStatistics

if TYPE_CHECKING:
    from tensordict import TensorDict

    from sdar_verl.table import StepTable
    from sdar_verl.verl.validation import ArmDataset


def learns(settings: SdarConfig) -> bool:
    """Whether a rule of this run reads rewards of earlier steps."""
    try:
        return any(get_rule(name).learns for name in settings.skills.retrieval)
    except RetrievalError:
        return False  # named by the checks before the start


class SkillStatistics(Observer):
    """Statistics per task type: each task gets them as a column of its prompt, each step's rewards are added.

    One observation is one task of a step: the mean reward of its episodes, whichever of them the teacher looks at
    (``sdar.context.episodes``), for each skill that it was supplied. Tasks none of whose episodes could be played are
    not counted.

    Args:
        settings: the ``sdar`` node.
    """

    name: ClassVar[str] = "skill_statistics"

    def __init__(self, settings: SdarConfig) -> None:
        self._sources = settings.context.sources
        self._by_type: dict[str, TypeStatistics] = {}

    def before_rollout(self, prompts: TensorDict) -> None:
        """Every task gets its type's statistics, and how many tasks of its type choose before it."""
        from verl.utils import tensordict_utils as tu

        seen: Counter[str] = Counter()
        columns = []
        for text in prompts["task"]:
            task_type = json.loads(text)["task_type"]
            columns.append(self._column(task_type, ahead=seen[task_type], explore=True))
            seen[task_type] += 1
        tu.assign_non_tensor_stack(prompts, EVIDENCE_COLUMN, columns)

    def before_validation(self, panel: ArmDataset) -> None:
        """Validation takes the best skill so far and explores nothing."""
        panel.columns.append(self._validation_columns)

    def _validation_columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {EVIDENCE_COLUMN: self._column(json.loads(row["task"])["task_type"], ahead=0, explore=False)}

    def _column(self, task_type: str, ahead: int, explore: bool) -> str:
        statistics = self._by_type.get(task_type, TypeStatistics())
        return json.dumps(Evidence(statistics, ahead, explore).as_dict(), sort_keys=True)

    def after_updates(self, table: StepTable, metrics: Mapping[str, Any]) -> Mapping[str, float]:
        """Add the step's rewards."""
        groups: dict[str, list[RowInfo]] = {}
        for row, info in zip(table.ids, table.infos, strict=True):
            if info is not None and info.episode is not None and not info.failed:
                groups.setdefault(row.uid, []).append(info)
        for uid in sorted(groups):
            episodes = groups[uid]
            first = episodes[0]
            skills = self._supplied(first)
            if not skills:
                continue
            reward = sum(info.episode.reward for info in episodes if info.episode is not None) / len(episodes)
            self._by_type.setdefault(first.task_type, TypeStatistics()).add(skills, reward)
        return statistics_metrics(self._by_type)

    def _supplied(self, first: RowInfo) -> Sequence[str]:
        """What was found for a task; its rows have none of it where the teacher does not look at the episode."""
        early = first.episode.passages if first.episode is not None else {}
        return first.skills or [skill for name in self._sources for skill in early.get(name, {}).get("skills", ())]

    def state_dict(self) -> dict[str, Any]:
        """All statistics."""
        return {"by_type": {name: statistics.as_dict() for name, statistics in sorted(self._by_type.items())}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Those of a checkpoint."""
        self._by_type = {name: TypeStatistics(**content) for name, content in state["by_type"].items()}


def statistics_metrics(by_type: Mapping[str, TypeStatistics]) -> dict[str, float]:
    """What has been counted so far, as metrics."""
    return {f"sdar/skill_queries/{task_type}": known.queries for task_type, known in sorted(by_type.items())}
