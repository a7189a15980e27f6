"""The skills of a task, as retrieval finds them in the run's bank."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache

from sdar_verl.config import SkillsConfig
from sdar_verl.context.base import Passage
from sdar_verl.envs.base import Task
from sdar_verl.rollout.rows import EVIDENCE_COLUMN, LEARNED_COLUMN
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.loading import load_run_bank
from sdar_verl.skills.retrieval import asked_in, fit_budget, render_skills, retrieve
from sdar_verl.skills.skill import skills_from_json
from sdar_verl.skills.ucb import Evidence


class SkillFinder:
    """The run's bank (``bank``) and its rules.

    Args:
        settings: the ``sdar.skills`` node.
        count_tokens: of the policy's tokenizer, for ``max_tokens``.
        env: the text environment, None where the tasks are a recipe's own.
    """

    def __init__(self, settings: SkillsConfig, count_tokens: Callable[[str], int], env: str | None):
        self._settings = settings
        self.bank = load_run_bank(settings, env)
        self._count_tokens = count_tokens
        self._with = lru_cache(maxsize=4)(lambda learned: self.bank.with_skills(skills_from_json(learned)))

    def find(self, task: Task, columns: Mapping[str, str] | None = None) -> Passage:
        """The skills for ``task``.

        Args:
            task: of the prompt.
            columns: those of the prompt that say what the run has learned of skills, see :data:`SKILL_COLUMNS`.
        """
        settings, columns = self._settings, columns or {}
        evidence, learned = columns.get(EVIDENCE_COLUMN), columns.get(LEARNED_COLUMN)
        known = Evidence.from_dict(json.loads(evidence)) if evidence else None
        bank: SkillBank = self._with(learned) if learned else self.bank
        task = asked_in(task, settings.column)
        found = retrieve(bank, task, settings.retrieval, settings.seed, settings.options, known)
        if settings.max_tokens is not None:
            found = fit_budget(found, settings.max_tokens, self._count_tokens)
        return Passage(render_skills(found.skills), found.names, found.no_match, len(found.dropped))
