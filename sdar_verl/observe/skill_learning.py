"""Skills that a run adds to its bank by itself (``sdar.skills.learn``).

Every so many steps the writer is shown episodes that have just ended and writes or revises a skill per task type. The
validation of the same step plays a panel of its own twice, with the bank as it is and with what was written; skills
with which success rose outside its interval go into the bank, from the next step on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdar_verl.config import SdarConfig
from sdar_verl.context.base import PlayedEpisode
from sdar_verl.envs.base import Task
from sdar_verl.observe.base import Observer
from sdar_verl.report import layout
from sdar_verl.rollout.groups import groups_of
from sdar_verl.rollout.rows import AFTER, BEFORE, LEARNED_COLUMN
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.learn import choose, write_bank, write_skills
from sdar_verl.skills.loading import load_run_bank
from sdar_verl.skills.skill import Skill, skills_from_json, skills_to_json
from sdar_verl.skills.verdict import Verdict, judge_skill

if TYPE_CHECKING:
    from tensordict import TensorDict

    from sdar_verl.table import StepTable
    from sdar_verl.verl.validation import ArmDataset


class SkillLearning(Observer):
    """The skills learned so far, which travel with each prompt, and those that wait to be judged.

    Args:
        settings: the ``sdar`` node.
        run: verl's trainer, for its writer and the panel that decides.
        folder: the run's record.
    """

    name: ClassVar[str] = "skill_learning"

    def __init__(self, settings: SdarConfig, run: Any, folder: Path) -> None:
        self._sdar, self._learn = settings, settings.skills.learn
        self._run = run
        self._folder = folder
        self._learned: dict[str, Skill] = {}
        self._proved: dict[str, dict[str, Any]] = {}
        self._candidates: dict[str, Skill] = {}
        self._version = 0
        self._written_at = 0
        self._counts: dict[str, float] = {}

    @cached_property
    def _base(self) -> SkillBank:
        return load_run_bank(self._sdar.skills, self._sdar.env.name)

    # ---------------------------------------------------------------- what prompts are sent

    def before_rollout(self, prompts: TensorDict) -> None:
        """Every prompt gets the skills learned so far."""
        if self._learned:
            from verl.utils import tensordict_utils as tu

            tu.assign_non_tensor_stack(prompts, LEARNED_COLUMN, [self._column()] * len(prompts))

    def before_validation(self, panel: ArmDataset) -> None:
        """So does every task of a validation; what waits to be judged is shown in an arm of its own."""
        if self._candidates:
            panel.judging = self._run.learn_panel
        if self._candidates or self._learned:
            panel.columns.append(
                lambda row: {LEARNED_COLUMN: self._column(self._candidates if row["sdar_arm"] == AFTER else {})}
            )

    def _column(self, further: Mapping[str, Skill] | None = None) -> str:
        return skills_to_json({**self._learned, **(further or {})}.values())

    # ---------------------------------------------------------------- writing

    def wants_rollout(self, step: int) -> bool:
        """Every so many steps, once in a step."""
        return step % self._learn.every == 0 and step != self._written_at

    def after_rollout(self, table: StepTable) -> None:
        """Have skills written from a step's finished episodes."""
        self._written_at = table.step
        found: dict[str, list[tuple[Task, PlayedEpisode]]] = {}
        for group in groups_of(table).values():
            found.setdefault(group.task.task_type, []).extend((group.task, one.played) for one in group.episodes)
        writing = self._run.writing()
        seen = choose(found, self._learn.episodes)
        bank = self._base.with_skills(self._learned.values())
        made = write_skills(bank, seen, writing, self._learn.max_words, table.step)
        texts = {skill.text for skill in bank}
        new = [skill for skill in made.values() if skill.text not in texts and self._fits(skill)]
        self._candidates = {skill.name: skill for skill in sorted(new, key=lambda skill: skill.name)}
        self._counts = {
            "sdar/skills/candidates": len(self._candidates),
            "sdar/skills/tokens": writing.metrics()["sdar/writer/tokens"],
        }

    def _fits(self, skill: Skill) -> bool:
        """One that alone is over the budget would stop the run."""
        assert self._sdar.skills.max_tokens is not None  # a check before the start
        ids = self._run.tokenizer(skill.text, add_special_tokens=False)["input_ids"]
        return len(ids) <= self._sdar.skills.max_tokens

    def after_updates(self, table: StepTable, metrics: Mapping[str, Any]) -> Mapping[str, float]:
        """Version of the bank, and at a step that wrote what came of it."""
        counts, self._counts = self._counts, {}
        return {"sdar/skills/version": self._version, "sdar/skills/learned": len(self._learned), **counts}

    # ---------------------------------------------------------------- judging

    @property
    def awaits_validation(self) -> bool:
        """Something waits to be judged."""
        return bool(self._candidates)

    def after_validation(self, step: int, metrics: Mapping[str, float], outcomes: dict[str, list[Any]]) -> None:
        """Take the skills that helped."""
        if not self._candidates:
            return
        before, after = (_success(outcomes, arm) for arm in (BEFORE, AFTER))
        types = dict(zip(map(str, outcomes["task_id"]), outcomes["task_type"], strict=True))
        verdicts = [judge_skill(skill, types, before, after) for skill in self._candidates.values()]
        taken = {verdict.skill.name: verdict for verdict in verdicts if verdict.taken}
        known = {skill.name for skill in self._base} | set(self._learned)
        self._version += bool(taken)
        for verdict in verdicts:
            print(f"sdar skills step {step}: {verdict}", flush=True)
            layout.append_line(self._folder / layout.SKILLS_FILE, self._line(step, verdict, known))
        for name, verdict in taken.items():
            self._learned[name] = verdict.skill
            self._proved[name] = {"learned-at-step": step, "gain": round(verdict.gain, 4), "tasks": verdict.tasks}
        self._candidates = {}
        if taken:
            bank = self._base.with_skills(self._learned.values())
            write_bank(bank, self._folder.parent / "skills" / f"version_{self._version}", self._proved)

    def _line(self, step: int, verdict: Verdict, known: Iterable[str]) -> dict[str, Any]:
        skill = verdict.skill
        numbers = {"gain": verdict.gain, "low": verdict.low, "high": verdict.high}
        return {
            "step": step,
            "version": self._version,
            "skill": skill.name,
            "description": skill.description,
            "text": skill.text,
            "task_types": list(skill.task_types),
            "revised": skill.name in known,
            "taken": verdict.taken,
            "tasks": verdict.tasks,
            **{name: None if math.isnan(value) else value for name, value in numbers.items()},
        }

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What was learned, what waits to be judged, and since when."""
        return {
            "version": self._version,
            "learned": skills_to_json(self._learned.values()),
            "proved": self._proved,
            "candidates": skills_to_json(self._candidates.values()),
            "written_at": self._written_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Those of a checkpoint."""
        learned, candidates = skills_from_json(state["learned"]), skills_from_json(state["candidates"])
        self._version, self._written_at = int(state["version"]), int(state["written_at"])
        self._proved = dict(state["proved"])
        self._learned = {skill.name: skill for skill in learned}
        self._candidates = {skill.name: skill for skill in candidates}
        # A checkpoint is saved before its step's validation, whose verdicts are passed again.
        layout.keep_steps(self._folder / layout.SKILLS_FILE, self._written_at - bool(candidates))


def _success(outcomes: Mapping[str, list[Any]], arm: str) -> dict[str, float]:
    """Task -> mean success of its episodes in an arm."""
    found: dict[str, list[float]] = {}
    for name, task, solved in zip(outcomes["arm"], outcomes["task_id"], outcomes["acc"], strict=True):
        if name == arm:
            found.setdefault(str(task), []).append(float(solved))
    return {task: sum(values) / len(values) for task, values in found.items()}
