"""Teacher prompts that can only be made when the whole group has ended: made here, by the trainer.

The agent loop keeps on each row what its prompt was made from, and on the first row of an episode its task and early
contexts. From these the very same template and chat template give the teacher's prompt; nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import NamedTuple, Protocol

import numpy as np
import torch

from sdar_verl.config import SdarConfig
from sdar_verl.context.base import ContextRequest, Passage
from sdar_verl.context.builder import ContextBuilder, Part, join
from sdar_verl.context.registry import ContextError
from sdar_verl.context.writing import Job
from sdar_verl.envs.base import Task
from sdar_verl.fields import TEACHER_PROMPTS, prompts_of
from sdar_verl.rollout.groups import Episode, Group, groups_of
from sdar_verl.rollout.prompt_builder import PromptBuilder, TurnView
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.rollout.teacher_prompt import add_teacher_prompt
from sdar_verl.table import StepTable, nested, stop_on_errors
from sdar_verl.writer.step import StepWriting


@dataclass
class _Shown:
    """What the teacher sees.

    Attributes:
        real: the context, for the records.
        seen: teacher -> itself or its placebo, of those that have a say; without a name where there is one teacher.
        bad: the different texts of the bad slot.
    """

    real: Passage
    seen: dict[str, Passage] = field(default_factory=dict)
    bad: list[Passage] = field(default_factory=list)


class _Place(NamedTuple):
    """What something is written for: a turn of an episode, or its turn 0 where all turns share a context; and which of
    several texts."""

    episode: str
    turn: int
    number: int


class LatePrompts(Protocol):
    """Makes the teacher's prompt of a row after its episode."""

    def add(self, task: Task, infos: Sequence[RowInfo], index: int, passage: Passage) -> None:
        """Fill in that of ``infos[index]``; ``infos`` are the rows of its episode, in order."""


class LateContexts:
    """Fills in the teacher's prompts of a step.

    Args:
        settings: the ``sdar`` node.
        contexts: of the run.
        prompts: make one as the agent loop would have.
        writing: asks the run's writer; None where no context needs one.
    """

    def __init__(
        self, settings: SdarConfig, contexts: ContextBuilder, prompts: LatePrompts, writing: StepWriting | None = None
    ) -> None:
        self._settings = settings
        self._contexts = contexts
        self._prompts = prompts
        self._writing = writing
        self._written: dict[_Place, dict[str, Passage]] | None = None

    @property
    def during_rollout(self) -> bool:
        """Whether :meth:`write` is to be called while the rollout servers are awake."""
        return self._writing is not None and self._writing.during_rollout

    def write(self, table: StepTable) -> None:
        """Have everything written that the contexts of these rows ask for; the next :meth:`fill` reads it.

        Raises:
            ContextError: a context function fails.
            RolloutError: the writer does not do its work.
        """
        assert self._writing is not None
        jobs: dict[tuple[_Place, str], Job] = {}
        for group in groups_of(table).values():
            for episode in group.episodes:
                for turn in self._turns(episode):
                    jobs |= self._jobs(group, episode, turn)
        self._written = {}
        for (place, name), passage in self._writing.passages(jobs, table.step).items():
            self._written.setdefault(place, {})[name] = passage

    def _jobs(self, group: Group, episode: Episode, turn: int) -> dict[tuple[_Place, str], Job]:
        """What is written for one turn, or for an episode as a whole, in both slots."""
        found: dict[tuple[_Place, str], Job] = {}
        for slot in filter(None, (self._contexts, self._contexts.contrast)):
            for part in slot.parts(group.task):
                request = self._request(group, episode, turn, part.number)
                place = _Place(episode.name, turn, part.number)
                for name, (context, options) in slot.written(part).items():
                    found[place, name] = (context, request, options)
        return found

    def fill(self, table: StepTable) -> dict[str, float]:
        """Add the teacher's prompt to every row whose context exists, in its record and as a column.

        Returns:
            Metrics of the writer, where there is one.

        Raises:
            ContextError: a context function fails.
            RolloutError: a prompt is too long, and that is an error; or see :meth:`write`.
        """
        if self._writing is not None and self._written is None:
            self.write(table)
        groups = groups_of(table)
        for uid, group in groups.items():
            for episode in group.episodes:
                self._fill_episode(groups, uid, episode)
        stop_on_errors([info.error for info in table.infos if info is not None])
        table.rows.write(
            {TEACHER_PROMPTS: _column(None if info is None else info.teacher_prompt_ids for info in table.infos)}
        )
        for name in table.further_passes:
            prompts = (None if info is None else info.further_prompts.get(name) for info in table.infos)
            table.rows.write({prompts_of(name): _column(prompts)})
        self._written = None
        return {} if self._writing is None else self._writing.metrics()

    def _fill_episode(self, groups: Mapping[str, Group], uid: str, episode: Episode) -> None:
        group, shown = groups[uid], None
        for index, info in enumerate(episode.infos):
            if shown is None or self._contexts.by_turn:
                shown = self._shown(groups, group, episode, info)
            info.skills, info.no_match = shown.real.skills, shown.real.no_match
            info.skills_dropped = shown.real.dropped
            info.context_missing = not shown.seen
            text = join([*shown.seen.values()]).text
            for step in info.steps:
                if step.text is not None:  # on traced steps
                    step.text["context"] = text
            if not info.foreign:
                self._add_teachers(group.task, episode.infos, index, shown.seen)
            if shown.bad and info.teacher_prompt_ids is not None:
                self._add_contrast(group.task, episode.infos, index, shown.bad)
            if index == 0 and shown.seen and info.teacher_prompt_tokens is not None:
                episode.note.context = text

    def _shown(self, groups: Mapping[str, Group], group: Group, episode: Episode, info: RowInfo) -> _Shown:
        """What the teacher sees on the rows of an episode, or on one of them where contexts differ by turn."""
        contrast = self._contexts.contrast
        if not self._looked_at(episode):
            return _Shown(Passage(""))
        if info.turns and self._contexts.by_turn:
            raise ContextError(
                f"sdar.context.sources={list(self._settings.context.named)} differ by turn, but a row of task "
                f"{info.task_id} holds {len(info.turns)} turns of a conversation; use contexts of the whole episode"
            )
        made = list(self._made(self._contexts, groups, group, episode, info.turn))
        real = join([real for _, real, _ in made])
        seen = {part.teacher: passage for part, _, passage in made if passage is not None}
        if contrast is None or not seen:
            return _Shown(real, seen)
        texts: dict[str, Passage] = {}
        for _, _, passage in self._made(contrast, groups, group, episode, info.turn):
            if passage is not None:
                texts.setdefault(passage.text, passage)
        return _Shown(real, seen if texts else {}, list(texts.values()))

    def _looked_at(self, episode: Episode) -> bool:
        wanted = self._settings.context.episodes
        return wanted == "all" or episode.infos[0].success == (wanted == "solved")

    def _turns(self, episode: Episode) -> list[int]:
        """Of the rows that may get a context of their own; the first stands for all where they share one."""
        if not self._looked_at(episode):
            return []
        if not self._contexts.by_turn:
            return [0]
        # A conversation of several turns is refused when its prompt is made.
        return [] if any(info.turns for info in episode.infos) else [info.turn for info in episode.infos]

    def _add_teachers(self, task: Task, infos: Sequence[RowInfo], index: int, seen: Mapping[str, Passage]) -> None:
        """The prompts of a row with each of its teachers' contexts; a teacher whose prompt does not fit has no say."""
        info = infos[index]
        made = {name: self._with(task, infos, index, passage) for name, passage in seen.items()}
        made = {name: copy for name, copy in made.items() if copy.teacher_prompt_ids is not None}
        if not made:
            return
        first, *others = made.values()
        info.teacher_prompt_ids, info.teacher_prompt_tokens = first.teacher_prompt_ids, first.teacher_prompt_tokens
        info.context_tokens = max(copy.context_tokens for copy in made.values())
        info.other_prompt_ids = tuple(copy.teacher_prompt_ids for copy in others if copy.teacher_prompt_ids is not None)
        info.teachers = tuple(filter(None, made))

    def _add_contrast(self, task: Task, infos: Sequence[RowInfo], index: int, texts: Sequence[Passage]) -> None:
        """The prompts of a row with each text of the bad context; without one, the row has no teacher."""
        info = infos[index]
        made = [self._with(task, infos, index, text).teacher_prompt_ids for text in texts]
        info.contrast_prompt_ids = tuple(ids for ids in made if ids is not None)
        if not info.contrast_prompt_ids:
            info.teacher_prompt_ids = info.teacher_prompt_tokens = None
            info.teachers = info.other_prompt_ids = ()

    def _with(self, task: Task, infos: Sequence[RowInfo], index: int, text: Passage) -> RowInfo:
        """A copy of a row's record with the teacher's prompt for a text, where it fits; a fault is noted on the row."""
        info = infos[index]
        copy = replace(info, teacher_prompt_ids=None, teacher_prompt_tokens=None)
        self._prompts.add(task, [*infos[:index], copy, *infos[index + 1 :]], index, text)
        info.truncated |= copy.truncated
        info.error = info.error or copy.error
        return copy

    def _made(
        self, contexts: ContextBuilder, groups: Mapping[str, Group], group: Group, episode: Episode, turn: int
    ) -> Iterator[tuple[Part, Passage, Passage | None]]:
        """Each part of an episode's context in a slot, and what the teacher sees of it: itself or its placebo, None
        without any."""
        for part in contexts.parts(group.task):
            real, other = self._passage(contexts, group, episode, turn, part), None
            if contexts.control == "wrong" and real.text:
                other = self._other(contexts, groups, group, turn, part.teacher)
            yield part, real, contexts.controlled(real, group.task.task_id, other, part.draw)

    def _passage(self, contexts: ContextBuilder, group: Group, episode: Episode, turn: int, part: Part) -> Passage:
        made = {name: Passage(**fields) for name, fields in episode.note.passages.items()}
        if self._written is not None:
            place = _Place(episode.name, turn if self._contexts.by_turn else 0, part.number)
            made |= self._written.get(place, {})
        return contexts.passage(self._request(group, episode, turn, part.number), made, part)

    def _request(self, group: Group, episode: Episode, turn: int, number: int) -> ContextRequest:
        return ContextRequest(
            group.task,
            seed=self._settings.context.seed,
            episode=episode.played,
            siblings=tuple(other.played for other in group.episodes if other is not episode),
            turn=turn,
            number=number,
            count_tokens=self._contexts.count_tokens,
        )

    def _other(
        self, contexts: ContextBuilder, groups: Mapping[str, Group], group: Group, turn: int, teacher: str
    ) -> Passage | None:
        """The context of an episode of this step whose task is of another type, or, where there is one type alone, of
        another task; None when there is none. Of the same teacher, where that task has it."""
        others = [other for other in groups.values() if other.task.task_type != group.task.task_type]
        others = others or [other for other in groups.values() if other.task.task_id != group.task.task_id]
        candidates = [(other, episode) for other in others for episode in other.episodes]
        Random(f"{self._settings.context.seed}:{group.task.task_id}").shuffle(candidates)
        for other, episode in candidates:
            parts = contexts.parts(other.task)
            part = next((part for part in parts if part.teacher == teacher), parts[0])
            passage = self._passage(contexts, other, episode, turn, part)
            if passage.text:
                return passage
        return None


class TurnPrompts:
    """Of the text environments: the same template and chat template as in the agent loop.

    Args:
        settings: the ``sdar`` node.
        prompts: the agent loop's, see :func:`~sdar_verl.rollout.runtime.make_prompts`.
    """

    def __init__(self, settings: SdarConfig, prompts: PromptBuilder) -> None:
        self._settings = settings
        self._prompts = prompts

    def add(self, task: Task, infos: Sequence[RowInfo], index: int, passage: Passage) -> None:
        """Fill in the teacher's prompt of a turn: what the student was shown, as the agent loop put it."""
        info = infos[index]
        length = min(self._settings.prompt.history_length, index) - info.history_dropped
        shown = TurnView(
            task=task.description,
            history=tuple((past.observation, past.action) for past in infos[index - length : index]),
            observation=info.observation,
            admissible_actions=tuple(info.admissible_actions),
            step=info.turn + 1,
            max_steps=self._settings.env.max_steps,
        )
        add_teacher_prompt(info, self._prompts, shown, passage, self._settings.teacher)


def _column(prompts: Iterable[np.ndarray | None]) -> torch.Tensor:
    """The prompt of every row, empty where it has none."""
    none = torch.zeros(0, dtype=torch.int32)
    return nested([torch.from_numpy(ids) if ids is not None else none for ids in prompts])
