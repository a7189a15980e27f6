"""What a training row carries beyond verl's own fields: how the agent loop talks to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from sdar_verl.envs.base import Task
from sdar_verl.fields import contrast_pass, teacher_pass

ROW_KEY = "sdar"
"""Key of the row's record inside verl's ``extra_fields``."""

EVIDENCE_COLUMN = "sdar_evidence"
"""Column of a prompt: what retrieval may know of earlier steps, as JSON; only with rules that learn."""

LEARNED_COLUMN = "sdar_learned"
"""Column of a prompt: skills that the run has learned so far, as JSON; they take the place of their namesakes."""

SKILL_COLUMNS = (EVIDENCE_COLUMN, LEARNED_COLUMN)

BEFORE, AFTER = "skills_before", "skills_after"
"""Validation arms that judge what was learned: the student is shown the skills of the bank without it and with it."""

TRACED_COLUMN = "sdar_traced"
"""Column of a prompt: its rows carry the words of their turns, whatever its step."""

RETIRED_COLUMN = "sdar_retired"
"""Column of a prompt: the teacher has retired, so its rows need no prompt of its own and no request."""

COLUMNS = ("teacher_prompt_ids", "other_prompt_ids", "contrast_prompt_ids", "teacher_log_probs", "teacher_support")
"""Of :class:`RowInfo`: they lie beside the row, not in its record."""


class RowId(NamedTuple):
    """Which row this is; in the order of these.

    Attributes:
        uid: of the prompt.
        session: which rollout of it.
        number: which row of that.
    """

    uid: str
    session: int
    number: int

    @property
    def episode(self) -> str:
        """Name of the rollout, unique over the step."""
        return f"{self.uid}_{self.session}"


def turn_text(
    task: Task, context: str, observation: str, action: str | None, result: str, reward: float
) -> dict[str, Any]:
    """The words of one turn, for traces.

    Args:
        task: its id and description are kept.
        context: what the teacher alone was shown; empty when there was nothing.
        observation: what the environment had said before the turn.
        action: what it was sent; None when the answer held no action.
        result: what it said then.
        reward: of this turn alone.
    """
    return {
        "task_id": task.task_id,
        "task": task.description,
        "context": context,
        "observation": observation,
        "action": action,
        "result": result,
        "reward": reward,
    }


@dataclass
class EpisodeNote:
    """What a whole episode is worth keeping; on its first row only.

    Attributes:
        task: fields of the :class:`~sdar_verl.envs.base.Task`.
        context: text that the teacher saw; None when it saw none. With a late context, filled in by the trainer.
        passages: early context -> fields of its passage, where the trainer makes the teacher's prompts.
        reward: the episode's return.
        last_observation: what the environment answered to the last action.
        teacher_wait_s: seconds from the end of its last turn to the rollout server's last answer for the teacher.
        said: what the reward function said beside the reward; filled in by the trainer.
    """

    task: dict[str, Any]
    context: str | None = None
    passages: dict[str, dict[str, Any]] = field(default_factory=dict)
    reward: float = 0.0
    last_observation: str = ""
    teacher_wait_s: float = 0.0
    said: dict[str, Any] = field(default_factory=dict)


@dataclass
class TurnNote:
    """One turn of a row that holds a whole conversation.

    Attributes:
        start: index of its first sampled token in the row's response.
        stop: index behind its last one.
        observation: as in :class:`RowInfo`, and so are the others.
    """

    start: int
    stop: int
    observation: str = ""
    action: str | None = None
    unparsed: bool = False
    parse_error: str | None = None
    inadmissible: bool = False
    text: dict[str, Any] | None = None

    @property
    def invalid(self) -> bool:
        """Unparsed, or inadmissible."""
        return self.unparsed or self.inadmissible


@dataclass
class RowInfo:
    """One row's record: a turn, or with ``sdar.rollout.rows=trajectory`` a whole conversation.

    Attributes:
        turn: 0-based index in its episode; 0 for a conversation.
        turns: of a conversation, in order; empty where the row is one turn.
        task_type: the environment's category of the task.
        task_id: the task's stable name.
        observation: what the agent saw at this turn.
        action: what was sent to the environment; None where the answer held no action.
        admissible_actions: what the environment offered, kept where the trainer makes the teacher's prompt.
        episode: on the first row of an episode, None on the others.
        skills: names of the skills in the context, in order.
        no_match: retrieval found no skill of this task's own.
        skills_dropped: skills that were found, but left out to keep within ``sdar.skills.max_tokens``.
        context_missing: the teacher has no say because its late context does not exist (no sibling succeeded, say), or
            the one to compare it with.
        context_empty: the teacher has no say because its sources found nothing for the task.
        prompt_tokens: tokens of the student's prompt.
        teacher_prompt_tokens: of the teacher's; None when the teacher has no say on this row.
        teacher_prompt_ids: its token ids, where the prompt was made; a column of its own elsewhere.
        teachers: sources whose teachers have a say on the row, where each has one (``sdar.context.teachers``).
        other_prompt_ids: token ids of its second teacher's prompt, its third's, ..., where several are mixed; columns
            elsewhere.
        contrast_prompt_ids: token ids with each text of the bad context, where there is one; columns elsewhere.
        teacher_log_probs: (response tokens,) float32, nats: what the rollout server answered for the teacher, where it
            was asked; a column of its own elsewhere.
        teacher_support: (response tokens, k) int32 and (response tokens, k + 1) float32, nats: the teacher's likeliest
            tokens, their log-probs and that of all others, where the server was asked for them.
        teacher_failure: why it could not, or why the teacher was silenced afterwards; or None.
        student_log_probs: (response tokens,) float32, nats: what it answered for the student's own prompt; on one row
            per task, to compare it with the trainer.
        context_tokens: tokens by which the teacher's prompt is longer than the student's.
        history_dropped: (observation, action) pairs left out so that the student's prompt fits.
        truncated: the teacher's prompt was too long for ``sdar.teacher.max_prompt_length`` as it was.
        unparsed: the answer held no action.
        parse_error: why not (:attr:`~sdar_verl.rollout.actions.ParsedAction.error`); None where it held one.
        inadmissible: it held one, but the environment does not offer it.
        success: the episode solved its task.
        score: how well it did, 0 to 1, where the environment grades it; else 1 for success.
        failed: the environment failed, twice; the row is masked everywhere.
        failure: why the environment failed, or None.
        error: why the run must stop, or None.
        text: what a trace shows of the turn in words (:func:`turn_text`); None on steps that are not traced.
        cut: the conversation ended because its next turn found no room in ``data.max_response_length``.
        rewarded: success and score are the reward function's, which has not spoken when the record is made.
        foreign: the agent loop made its prompt in a way that the teacher's cannot be made.
        built: messages and tools of the student's prompt, where the trainer makes the teacher's.
    """

    turn: int
    task_type: str
    turns: tuple[TurnNote, ...] = ()
    task_id: str = ""
    observation: str = ""
    action: str | None = None
    admissible_actions: tuple[str, ...] = ()
    episode: EpisodeNote | None = None
    skills: tuple[str, ...] = ()
    no_match: bool = False
    skills_dropped: int = 0
    context_missing: bool = False
    context_empty: bool = False
    prompt_tokens: int = 0
    teacher_prompt_tokens: int | None = None
    teacher_prompt_ids: np.ndarray | None = None
    teachers: tuple[str, ...] = ()
    other_prompt_ids: tuple[np.ndarray, ...] = ()
    contrast_prompt_ids: tuple[np.ndarray, ...] = ()
    teacher_log_probs: np.ndarray | None = None
    teacher_support: tuple[np.ndarray, np.ndarray] | None = None
    teacher_failure: str | None = None
    student_log_probs: np.ndarray | None = None
    context_tokens: int = 0
    history_dropped: int = 0
    truncated: bool = False
    unparsed: bool = False
    parse_error: str | None = None
    inadmissible: bool = False
    success: bool = False
    score: float = 0.0
    failed: bool = False
    failure: str | None = None
    error: str | None = None
    text: dict[str, Any] | None = None
    cut: bool = False
    rewarded: bool = False
    foreign: bool = False
    built: dict[str, Any] | None = None

    @property
    def steps(self) -> Sequence[RowInfo | TurnNote]:
        """The row's turns: those of the conversation, or the row itself."""
        return self.turns or (self,)

    @property
    def invalid(self) -> bool:
        """Unparsed, or inadmissible: what the invalid-action penalty is for."""
        return self.unparsed or self.inadmissible

    @property
    def further_prompts(self) -> dict[str, np.ndarray]:
        """Pass -> token ids of its prompt, of the teacher passes over this row beyond the first."""
        others = {teacher_pass(number): ids for number, ids in enumerate(self.other_prompt_ids, start=1)}
        return others | {contrast_pass(number): ids for number, ids in enumerate(self.contrast_prompt_ids)}

    @property
    def has_teacher(self) -> bool:
        """The teacher has a say on this row."""
        return self.teacher_prompt_tokens is not None and self.teacher_failure is None

    def take_teacher_prompt(self, ids: Sequence[int]) -> None:
        """These are the teacher's prompt; the student's is known."""
        self.teacher_prompt_ids, self.teacher_prompt_tokens = np.asarray(ids, dtype=np.int32), len(ids)
        self.context_tokens = len(ids) - self.prompt_tokens

    def as_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as plain values, for verl's ``extra_fields``; without :data:`COLUMNS`."""
        return _changed(self, leave=COLUMNS)

    @classmethod
    def from_extra_fields(cls, extra_fields: Any) -> RowInfo:
        """Read the record back; an error when no agent loop of ours, and none that is taught, made the row."""
        record = extra_fields.get(ROW_KEY) if isinstance(extra_fields, dict) else None
        if record is None:
            raise ValueError(
                "a row has no sdar record, so an agent loop made it that no loop of ours has run; with a text "
                "environment set actor_rollout_ref.rollout.agent.default_agent_loop=sdar_agent (and leave the panel's "
                "agent_name column out), with a recipe of verl's leave agent_loop_manager_class at its default"
            )
        episode = record.get("episode")
        turns = tuple(TurnNote(**turn) for turn in record.get("turns", ()))
        return cls(**{**record, "episode": EpisodeNote(**episode) if episode else None, "turns": turns})


def _changed(record: Any, leave: Sequence[str] = ()) -> dict[str, Any]:
    """A record's values that are not its defaults: a step has thousands of rows, and most of a record is defaults."""
    values = {}
    for item in fields(record):
        value = getattr(record, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if item.name in leave or (not isinstance(value, np.ndarray) and value == default):
            continue
        if isinstance(value, EpisodeNote):
            value = _changed(value)
        elif item.name == "turns":
            value = [_changed(turn) for turn in value]
        values[item.name] = value
    return values
