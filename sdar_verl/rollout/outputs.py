"""An episode as verl's training rows: one per turn with the episode's reward on each, or one for the conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, Field
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

from sdar_verl.config import SdarConfig
from sdar_verl.envs.base import Task
from sdar_verl.fields import SUPPORT_IDS, SUPPORT_LOG_PROBS, TEACHER_LOG_PROBS, TEACHER_MASK, TEACHER_PROMPTS
from sdar_verl.requests import server_support
from sdar_verl.rollout.rows import ROW_KEY, RowInfo, TurnNote
from sdar_verl.verl import symbols

symbols.check("rows")


@dataclass
class Turn:
    """One request to the rollout server and what came of it.

    Attributes:
        prompt_ids: what the server was sent.
        response_ids: what it sampled, verbatim.
        log_probs: of these tokens; None when the server gives none.
        info: the row's record.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    log_probs: list[float] | None
    info: RowInfo


@dataclass
class Episode:
    """What was played.

    Attributes:
        turns: in order.
        reward: sum of the environment's rewards.
        success: the environment says that the task is solved.
        score: how well it was done, 0 to 1.
        weight_steps: training steps of the weights that sampled.
        generate_s: seconds spent waiting for the rollout server.
        env_s: seconds spent waiting for the environment.
        preempted: requests that the server had to interrupt.
        cut: a next turn found no room in the conversation.
    """

    turns: list[Turn] = field(default_factory=list)
    reward: float = 0.0
    success: bool = False
    score: float = 0.0
    weight_steps: list[int] = field(default_factory=list)
    generate_s: float = 0.0
    env_s: float = 0.0
    preempted: int = 0
    cut: bool = False


class RowOutput(AgentLoopOutput):
    """What an agent loop returns for one row; verl stores ``as_dict()`` column by column in its queue.

    Attributes:
        columns: name -> (tokens,) array; each becomes a column beside verl's own, where workers read it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    columns: dict[str, np.ndarray] = Field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """verl's columns and ours."""
        output = super().as_dict()
        output.pop("columns", None)
        return output | {name: torch.from_numpy(values) for name, values in self.columns.items()}


def teacher_columns(info: RowInfo, mask: Sequence[int], sdar: SdarConfig) -> dict[str, np.ndarray]:
    """What lies beside verl's own columns of a training row; a late context's prompts are written by the trainer.

    Args:
        info: the row's record, which gets an error where the rollout server was to answer and did not.
        mask: (response tokens,), 1 where the policy sampled.
        sdar: the ``sdar`` node.
    """
    settings = sdar.teacher
    if settings.source == "none":
        return {}
    ids = info.teacher_prompt_ids
    columns = {TEACHER_PROMPTS: np.zeros(0, dtype=np.int32) if ids is None else ids}
    if settings.placement == "rollout_server":
        seen = np.asarray(mask, dtype=np.int64) * info.has_teacher
        answer = info.teacher_log_probs
        if seen.any() and (answer is None or len(answer) != len(mask)):
            given = "no answer" if answer is None else f"{len(answer)} log-probs"
            info.error = f"sdar.teacher.placement=rollout_server: a row of {len(mask)} tokens has {given}"
            seen, answer = np.zeros_like(seen), None
        columns[TEACHER_MASK] = seen
        columns[TEACHER_LOG_PROBS] = (np.zeros(len(mask)) if answer is None else answer).astype(np.float32)
        if likeliest := server_support(sdar):
            nothing = np.zeros((len(mask), likeliest), np.int32), np.zeros((len(mask), likeliest + 1), np.float32)
            support = nothing if answer is None or info.teacher_support is None else info.teacher_support
            columns[SUPPORT_IDS], columns[SUPPORT_LOG_PROBS] = support
    return columns


class OutputMaker:
    """Makes verl's rows.

    Args:
        eos_token_id: stands where a row has no token of its own.
        log_probs: whether rows carry the rollout's log-probs.
        sdar: the ``sdar`` node.
    """

    def __init__(self, eos_token_id: int, *, log_probs: bool, sdar: SdarConfig) -> None:
        self._eos = eos_token_id
        self._log_probs = log_probs
        self._sdar = sdar

    def rows(self, episode: Episode, task: Task, arm: str | None, *, whole: bool) -> list[AgentLoopOutput]:
        """One row per turn, or one for the ``whole`` conversation."""
        steps = episode.weight_steps or [0]
        metrics = AgentLoopMetrics(
            generate_sequences=episode.generate_s, tool_calls=episode.env_s, num_preempted=episode.preempted
        )
        outcome = _outcome(task, arm, episode)
        rows: list[AgentLoopOutput] = []
        for row in [_conversation(episode)] if whole else [_Row.of_turn(turn) for turn in episode.turns]:
            row.info.success, row.info.score = episode.success, episode.score
            # A server that was cut off before its first token leaves nothing to train on: one masked token keeps shape.
            empty = not row.response_ids
            mask = [0] if empty else row.mask
            rows.append(
                RowOutput(
                    columns=self._columns(row.info, mask, arm),
                    prompt_ids=row.prompt_ids,
                    response_ids=[self._eos] if empty else row.response_ids,
                    response_mask=mask,
                    response_logprobs=([0.0] if empty else row.log_probs) if self._log_probs else None,
                    reward_score=episode.reward,
                    num_turns=len(episode.turns),
                    metrics=metrics,
                    extra_fields={
                        "min_global_steps": min(steps),
                        "max_global_steps": max(steps),
                        "reward_extra_info": outcome,
                        ROW_KEY: row.info.as_dict(),
                    },
                )
            )
        return rows

    def failed_row(
        self, task: Task, arm: str | None, step: int, *, error: str | None = None, failure: str | None = None
    ) -> AgentLoopOutput:
        """The one masked row of an episode that could not be played.

        Args:
            task: that was to be played.
            arm: validation arm, None in training.
            step: training step whose weights would have sampled.
            error: why the run must stop, or None.
            failure: why the environment failed, or None.
        """
        info = RowInfo(
            turn=0, task_type=task.task_type, task_id=task.task_id, failed=True, failure=failure, error=error
        )
        return RowOutput(
            columns=self._columns(info, [0], arm),
            prompt_ids=[self._eos],
            response_ids=[self._eos],
            response_mask=[0],
            response_logprobs=[0.0] if self._log_probs else None,
            reward_score=0.0,
            num_turns=0,
            metrics=AgentLoopMetrics(),
            extra_fields={
                "min_global_steps": step,
                "max_global_steps": step,
                "reward_extra_info": _outcome(task, arm, None, error, failure),
                ROW_KEY: info.as_dict(),
            },
        )

    def _columns(self, info: RowInfo, mask: list[int], arm: str | None) -> dict[str, np.ndarray]:
        return {} if arm is not None else teacher_columns(info, mask, self._sdar)


@dataclass
class _Row:
    """Token by token: ``mask`` is 1 on sampled tokens, ``log_probs`` 0 on the others."""

    prompt_ids: list[int]
    response_ids: list[int]
    mask: list[int]
    log_probs: list[float]
    info: RowInfo

    @classmethod
    def of_turn(cls, turn: Turn) -> _Row:
        log_probs = list(turn.log_probs or [])[: len(turn.response_ids)]
        return cls(turn.prompt_ids, turn.response_ids, [1] * len(turn.response_ids), log_probs, turn.info)


def conversation(episode: Episode) -> list[int]:
    """Token ids behind the first prompt: the answers, and between them what the environment said."""
    first, last = episode.turns[0], episode.turns[-1]
    return [*last.prompt_ids, *last.response_ids][len(first.prompt_ids) :]


def _conversation(episode: Episode) -> _Row:
    """All turns in one row: the first prompt; behind it the answers, and, masked, what was said between them."""
    first = episode.turns[0]
    tokens = list(first.prompt_ids)
    mask: list[int] = []
    log_probs: list[float] = []
    notes = []
    for turn in episode.turns:
        said, answer = turn.prompt_ids[len(tokens) :], _Row.of_turn(turn)
        tokens += [*said, *answer.response_ids]
        mask += [*[0] * len(said), *answer.mask]
        log_probs += [*[0.0] * len(said), *answer.log_probs]
        notes.append(
            TurnNote(
                start=len(mask) - len(answer.mask),
                stop=len(mask),
                observation=turn.info.observation,
                action=turn.info.action,
                unparsed=turn.info.unparsed,
                parse_error=turn.info.parse_error,
                inadmissible=turn.info.inadmissible,
                text=turn.info.text,
            )
        )
    info = replace(
        first.info, turns=tuple(notes), cut=episode.cut, unparsed=False, parse_error=None, inadmissible=False
    )
    return _Row(first.prompt_ids, tokens[len(first.prompt_ids) :], mask, log_probs, info)


def _outcome(
    task: Task, arm: str | None, episode: Episode | None, error: str | None = None, failure: str | None = None
) -> dict[str, Any]:
    """The episode's result, for verl's validation tables; ``acc`` is the name verl looks for."""
    turns = episode.turns if episode else []
    return {
        "acc": float(episode.success) if episode else 0.0,
        "task_score": episode.score if episode else 0.0,
        "turns": float(len(turns)),
        "invalid_actions": float(sum(turn.info.invalid for turn in turns)),
        "failed": float(episode is None),
        "task_type": task.task_type,
        "task_id": task.task_id,
        "arm": arm or "train",
        "error": error or "",
        "failure": failure or "",
    }
