"""Skills that a run adds to its bank by itself (``sdar.skills.learn``).

Every so many steps the writer is shown episodes that have just ended and writes or revises a skill per task type. The
validation of the same step plays a panel of its own twice, with the bank as it is and with what was written; skills
with which success rose outside its interval go with every prompt that is sent out from then on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sdar_verl.config import SdarConfig
from sdar_verl.context.base import PlayedEpisode
from sdar_verl.envs.base import Task
from sdar_verl.observe.base import Observer
from sdar_verl.panels import read_panel
from sdar_verl.report import layout
from sdar_verl.rollout.groups import groups_of
from sdar_verl.rollout.rows import AFTER, BEFORE, LEARNED_COLUMN
from sdar_verl.rollout.skills_of import SkillFinder
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.learn import choose, write_bank, write_skills
from sdar_verl.skills.skill import Skill, skills_from_json, skills_to_json
from sdar_verl.skills.verdict import Verdict, judge_skill

if TYPE_CHECKING:
    from tensordict import TensorDict

    from sdar_verl.table import StepTable
    from sdar_verl.verl.validation import ArmDataset
    from sdar_verl.writer.step import StepWriting


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
        self._asked: dict[str, str] = {}  # task type -> the skill that was written for it
        self._version = 0
        self._written_at = 0
        self._counts: dict[str, float] = {}

    @cached_property
    def _finder(self) -> SkillFinder:
        return SkillFinder(self._sdar.skills, self._count_tokens, self._sdar.env.name)

    @property
    def _bank(self) -> SkillBank:
        return self._finder.bank.with_skills(self._learned.values())

    @cached_property
    def _writing(self) -> StepWriting:
        return self._run.writing()  # one of a run: it stops the run when most of what is asked fails

    @cached_property
    def _panel(self) -> list[Task]:
        assert self._learn.panel is not None  # a check before the start
        return read_panel(self._learn.panel)

    def _count_tokens(self, text: str) -> int:
        return len(self._run.tokenizer(text, add_special_tokens=False)["input_ids"])

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
            panel.columns.append(self._validation_columns)

    def _validation_columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        judged = row["sdar_arm"] == AFTER
        return {LEARNED_COLUMN: self._column(json.loads(row["task"])["task_type"] if judged else "")}

    def _column(self, task_type: str = "") -> str:
        """What was learned, with the one candidate that tasks of a type judge: each is judged by itself."""
        one = self._candidate(task_type)
        return skills_to_json({**self._learned, **({} if one is None else {one.name: one})}.values())

    def _candidate(self, task_type: str) -> Skill | None:
        """The candidate that was written for a task type, or the first of those that serve it, too."""
        serve = {name: skill for name, skill in sorted(self._candidates.items()) if task_type in skill.task_types}
        return serve.get(self._asked.get(task_type, ""), next(iter(serve.values()), None))

    # ---------------------------------------------------------------- writing

    def wants_rollout(self, step: int) -> bool:
        """Every so many steps, once in a step."""
        return step % self._learn.every == 0 and step != self._written_at

    def after_rollout(self, table: StepTable) -> None:
        """Have skills written from a step's finished episodes."""
        self._written_at = table.step
        bank = self._bank
        seen = choose(_by_type(table), self._learn.episodes)
        made = write_skills(bank, seen, self._writing, self._learn.max_words, table.step)
        known = {skill.text for skill in bank}
        new = sorted((skill for skill in made.values() if skill.text not in known), key=lambda skill: skill.name)
        self._asked = {task_type: skill.name for task_type, skill in made.items()}
        self._candidates = {skill.name: skill for skill in new}  # a task judges one of them
        self._candidates = {skill.name: skill for skill in new if self._shows(skill)}
        counts = self._writing.metrics()
        self._counts = {
            "sdar/skills/asked": counts["sdar/writer/asked"],
            "sdar/skills/written": len(made),
            "sdar/skills/candidates": len(self._candidates),
            "sdar/skills/tokens": counts["sdar/writer/tokens"],
        }

    def _shows(self, skill: Skill) -> list[str]:
        """The tasks of the panel that judge a candidate: retrieval and budget may pass it over."""
        assert self._sdar.skills.max_tokens is not None  # a check before the start
        if self._count_tokens(skill.text) > self._sdar.skills.max_tokens:
            return []  # where it came first, it would stop the run
        column = {LEARNED_COLUMN: skills_to_json({**self._learned, skill.name: skill}.values())}
        tasks = [task for task in self._panel if self._candidate(task.task_type) is skill]
        return [task.task_id for task in tasks if skill.name in self._finder.find(task, column).skills]

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
        candidates = self._candidates.values()
        verdicts = [judge_skill(skill, self._shows(skill), before, after) for skill in candidates]
        taken = {verdict.skill.name: verdict for verdict in verdicts if verdict.taken}
        known = {skill.name for skill in self._bank}
        self._version += bool(taken)
        for verdict in verdicts:
            print(f"sdar skills step {step}: {verdict}", flush=True)
            layout.append_line(self._folder / layout.SKILLS_FILE, self._line(step, verdict, known))
        for name, verdict in taken.items():
            self._learned[name] = verdict.skill
            self._proved[name] = {"learned-at-step": step, "gain": round(verdict.gain, 4), "tasks": verdict.tasks}
        self._candidates = {}
        if taken:
            self._write_bank()

    def _write_bank(self) -> None:
        """This version as a folder; later ones are of a run that has been taken back."""
        for folder in (self._folder.parent / layout.SKILLS).glob("version_*"):
            number = folder.name.removeprefix("version_")
            if number.isdecimal() and int(number) >= self._version:
                shutil.rmtree(folder)
        if self._version:
            write_bank(self._bank, self._folder.parent / layout.SKILLS / f"version_{self._version}", self._proved)

    def _line(self, step: int, verdict: Verdict, known: Iterable[str]) -> dict[str, Any]:
        skill = verdict.skill
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
            **verdict.numbers,
        }

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What was learned, what waits to be judged, and since when."""
        return {
            "version": self._version,
            "learned": skills_to_json(self._learned.values()),
            "proved": self._proved,
            "candidates": skills_to_json(self._candidates.values()),
            "asked": self._asked,
            "written_at": self._written_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Those of a checkpoint."""
        learned, candidates = skills_from_json(state["learned"]), skills_from_json(state["candidates"])
        self._version, self._written_at = int(state["version"]), int(state["written_at"])
        self._proved, self._asked = dict(state["proved"]), dict(state.get("asked", {}))
        self._learned = {skill.name: skill for skill in learned}
        self._candidates = {skill.name: skill for skill in candidates}
        self._write_bank()
        # A checkpoint is saved before its step's validation, whose verdicts are passed again.
        layout.keep_steps(self._folder / layout.SKILLS_FILE, self._written_at - bool(candidates))


def _by_type(table: StepTable) -> dict[str, list[tuple[Task, PlayedEpisode]]]:
    """Task type -> finished episodes, one of each group in turn: the first few are then of many tasks."""
    groups = list(groups_of(table).values())
    found: dict[str, list[tuple[Task, PlayedEpisode]]] = {}
    for number in range(max((len(group.episodes) for group in groups), default=0)):
        for group in groups:
            if number < len(group.episodes):
                found.setdefault(group.task.task_type, []).append((group.task, group.episodes[number].played))
    return found


def _success(outcomes: Mapping[str, list[Any]], arm: str) -> dict[str, float]:
    """Task -> mean success of its episodes in an arm."""
    found: dict[str, list[float]] = {}
    for name, task, solved in zip(outcomes["arm"], outcomes["task_id"], outcomes["acc"], strict=True):
        if name == arm:
            found.setdefault(str(task), []).append(float(solved))
    return {task: sum(values) / len(values) for task, values in found.items()}
