"""The rule ``ucb``: skills chosen by the rewards of earlier steps (arXiv:2605.15155, skill retrieval).

    score(e) = mean reward of the tasks for which e was supplied + c * sqrt(ln N / n(e))

with N the queries for the task's type and n(e) those that were supplied e. Statistics are kept by the trainer, once per
run (``sdar_verl/observe/skill_statistics.py``); what a worker gets is a snapshot that travels with each task, so
the choice does not depend on how many workers there are, nor on which episode ended first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from sdar_verl.envs.base import Task
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.registry import RetrievalError, register_retriever
from sdar_verl.skills.rules import by_keyword, for_task_type, general_skills
from sdar_verl.skills.skill import Skill


@dataclass
class TypeStatistics:
    """What is known about one task type.

    Attributes:
        queries: tasks of this type for which skills were supplied, N.
        supplied: skill -> tasks that were supplied it, n(e).
        reward: skill -> sum over these tasks of their mean episode reward.
    """

    queries: int = 0
    supplied: dict[str, int] = field(default_factory=dict)
    reward: dict[str, float] = field(default_factory=dict)

    def add(self, skills: Iterable[str], reward: float) -> None:
        """Count one task that was supplied ``skills`` and whose episodes earned ``reward`` on average."""
        self.queries += 1
        for name in skills:
            self.supplied[name] = self.supplied.get(name, 0) + 1
            self.reward[name] = self.reward.get(name, 0.0) + reward

    def mean(self, skill: str) -> float:
        """Mean reward of the tasks that were supplied ``skill``; it must have been."""
        return self.reward[skill] / self.supplied[skill]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"queries": self.queries, "supplied": dict(self.supplied), "reward": dict(self.reward)}


@dataclass(frozen=True)
class Evidence:
    """What a task's retrieval may know.

    Attributes:
        statistics: of the task's type, as they were before the step.
        ahead: tasks of the same type before this one in the step's batch. Their choices are counted first, as if their
            rewards had been the mean: otherwise all tasks of a step would get the same skill.
        explore: False in validation, where the best mean is taken.
    """

    statistics: TypeStatistics = field(default_factory=TypeStatistics)
    ahead: int = 0
    explore: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"statistics": self.statistics.as_dict(), "ahead": self.ahead, "explore": self.explore}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Evidence:
        """What :meth:`as_dict` gave."""
        return cls(TypeStatistics(**content["statistics"]), content["ahead"], content["explore"])


@register_retriever("ucb")
def ucb(
    bank: SkillBank,
    task: Task,
    seed: int,
    *,
    c: Annotated[float, Field(ge=0)] = 1.0,
    top: Annotated[int, Field(ge=1)] = 1,
    cold_start: Literal["first", "prior"] = "first",
    prior: Annotated[float, Field(allow_inf_nan=False)] = 0.0,
    candidates: Literal["all", "matching"] = "all",
    evidence: Evidence | None = None,
) -> list[Skill]:
    """The specific skills with the highest upper confidence bound, best first, and the general ones.

    Args:
        bank: where to look.
        task: its type is read, and its description with ``candidates="matching"``.
        seed: of the order in which skills that were never supplied are tried.
        c: weight of exploration, in units of the reward (the paper does not say its value).
        top: how many skills.
        cold_start: ``first``: a skill that was never supplied comes before all others; ``prior``: each counts as
            supplied once more, with the reward ``prior`` (the paper does not say which).
        prior: see ``cold_start``.
        candidates: ``all`` specific skills, or those ``matching`` the task by type or keyword.
        evidence: what earlier steps told; nothing when None.

    Raises:
        RetrievalError: an option without effect.
    """
    if prior and cold_start != "prior":
        raise RetrievalError(
            f"sdar.skills.options.ucb.prior={prior} has no effect with cold_start={cold_start}; use cold_start=prior"
        )
    evidence = evidence or Evidence()
    pool = {skill.name: skill for skill in bank.specific}
    if candidates == "matching":
        pool = {skill.name: skill for skill in [*by_keyword(bank, task), *for_task_type(bank, task)]}
    names = _shuffled(sorted(pool), f"{seed}:{task.task_type}")
    known = evidence.statistics
    queries, supplied = known.queries, {name: known.supplied.get(name, 0) for name in names}
    means = {name: known.mean(name) for name in names if supplied[name]}
    fallback = sum(known.reward.values()) / max(1, sum(known.supplied.values()))
    if not evidence.explore and means:
        best = sorted(means, key=lambda name: (-means[name], names.index(name)))[:top]
        return [pool[name] for name in best] + general_skills(bank)
    if cold_start == "prior":
        queries += len(names)
        supplied = {name: count + 1 for name, count in supplied.items()}
        means = {name: (known.reward.get(name, 0.0) + prior) / supplied[name] for name in names}
    chosen: list[str] = []
    for _ in range(evidence.ahead + 1):
        scores = {name: _score(means.get(name), supplied[name], queries, c) for name in names}
        chosen = sorted(names, key=lambda name: (-scores[name], names.index(name)))[:top]
        queries += 1
        for name in chosen:
            supplied[name] += 1
            means.setdefault(name, fallback)
    return [pool[name] for name in chosen] + general_skills(bank)


def _score(mean: float | None, supplied: int, queries: int, c: float) -> float:
    if mean is None:
        return math.inf
    return mean + c * math.sqrt(math.log(max(1, queries)) / supplied)


def _shuffled(names: Sequence[str], seed: str) -> list[str]:
    order = list(names)
    random.Random(seed).shuffle(order)
    return order
