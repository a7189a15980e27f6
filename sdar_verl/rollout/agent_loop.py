"""The agent loop ``sdar_agent``: an LLM acts in a text environment for several turns; each turn becomes a training row.

Beside the student's prompt every row carries the teacher's: the same turn with the skill slot filled. The teacher's
log-probs are computed later, by the trainer, on the very response ids sampled here.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import numpy as np
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register

from sdar_verl.config import ValidationArm
from sdar_verl.envs.base import Step, Task
from sdar_verl.envs.pool import EnvError, EnvProcessError
from sdar_verl.rollout.actions import match_admissible, parse_action
from sdar_verl.rollout.prompt_builder import PromptTooLong, TurnContext
from sdar_verl.rollout.prompts import PromptTemplateError
from sdar_verl.rollout.rows import ROW_KEY, RowInfo, turn_text
from sdar_verl.rollout.runtime import Context, Runtime, get_runtime
from sdar_verl.skills.retrieval import RetrievalError

logger = logging.getLogger(__name__)

NO_ACTION = "none"
"""Sent to the environment, which does not know it, where an answer held no action."""


@dataclass
class _Turn:
    prompt_ids: list[int]
    response_ids: list[int]
    log_probs: list[float] | None
    info: RowInfo


@dataclass
class _Episode:
    turns: list[_Turn] = field(default_factory=list)
    reward: float = 0.0
    success: bool = False
    score: float = 0.0
    weight_steps: list[int] = field(default_factory=list)
    generate_s: float = 0.0
    env_s: float = 0.0
    preempted: int = 0


@register("sdar_agent")
class SdarAgentLoop(AgentLoopBase):
    """One episode: reset, then prompt, sample, parse, step until the environment or ``sdar.env.max_steps`` ends it."""

    tokenizer: Any  # verl's annotation names the factory, not a tokenizer

    def __init__(self, trainer_config: Any, server_manager: Any, tokenizer: Any, **kwargs: Any):
        # verl's own initialiser builds a token merger for the model's family, per trajectory, which growing
        # conversations need and which makes demands on the tokenizer. Here every turn is a prompt of its own, encoded
        # once; so it is not called.
        self.config = trainer_config.config
        self.rollout_config = self.config.actor_rollout_ref.rollout
        self.server_manager = server_manager
        self.tokenizer = tokenizer

    async def run(  # type: ignore[override]  # verl's worker takes lists, its annotation has not followed
        self, sampling_params: dict[str, Any], **kwargs: Any
    ) -> list[AgentLoopOutput]:
        """Play the task of this dataset row.

        Args:
            sampling_params: verl's; a validation arm replaces the temperature.
            **kwargs: the row's columns, ``task`` among them (a JSON object, see ``sdar_verl.panels``).

        Returns:
            One output per turn, the episode's reward on each. An episode whose environment process failed twice comes
            back as one masked row, so that its group goes on without it.
        """
        runtime = get_runtime(self.config, self.tokenizer)
        task = Task(**json.loads(kwargs["task"]))
        arm_name = kwargs.get("sdar_arm")
        arm = runtime.arm(arm_name) if arm_name is not None else None
        if arm is not None:
            sampling_params = {**sampling_params, "temperature": arm.temperature}
        seed_parts = (task.task_id, arm_name, kwargs.get("global_steps"), kwargs.get("session_id"))

        traced = arm is None and runtime.traces(kwargs.get("global_steps"))
        failure = ""
        for attempt in (1, 2):
            try:
                episode = await self._play(runtime, task, arm, sampling_params, seed_parts, traced)
                break
            except EnvProcessError as error:
                logger.warning("task %s, attempt %d: %s", task.task_id, attempt, error)
                failure = str(error)
            except (EnvError, PromptTooLong, PromptTemplateError, RetrievalError) as error:
                # Not this episode's bad luck but a fault of the set-up. An exception here would only cost the group;
                # the trainer reads this text and stops.
                return [self._failed_row(task, arm_name, kwargs, f"task {task.task_id}: {error}")]
        else:
            return [self._failed_row(task, arm_name, kwargs, failure=failure)]
        return self._rows(episode, task, arm_name)

    async def _play(
        self,
        runtime: Runtime,
        task: Task,
        arm: ValidationArm | None,
        sampling_params: dict[str, Any],
        seed_parts: tuple[Any, ...],
        traced: bool,
    ) -> _Episode:
        settings = runtime.sdar
        wants_teacher = arm is None and settings.teacher.source != "none"
        shows_skills = arm is not None and arm.context == "skills"
        context = runtime.context(task) if wants_teacher or shows_skills else Context()

        episode = _Episode()
        history: list[tuple[str, str | None]] = []
        request_id = uuid4().hex
        async with runtime.pool.session(task) as session:
            started = time.perf_counter()
            state: Step = await session.reset()
            episode.env_s += time.perf_counter() - started
            for turn_index in range(settings.env.max_steps):
                shown = TurnContext(
                    task=task.description,
                    history=tuple(history[-settings.prompt.history_length :] if settings.prompt.history_length else ()),
                    observation=state.observation,
                    admissible_actions=(*state.action_forms, *state.admissible_actions),
                    step=turn_index + 1,
                    max_steps=settings.env.max_steps,
                )
                prompt_ids, shown, dropped = self._student_prompt(runtime, shown, context.text if shows_skills else "")
                info = RowInfo(turn=turn_index, task_type=task.task_type, history_dropped=dropped)
                if wants_teacher:
                    self._teacher_prompt(runtime, shown, context, len(prompt_ids), info)

                started = time.perf_counter()
                seed = runtime.request_seed(*seed_parts, turn_index)
                output = await self.server_manager.generate(
                    request_id=request_id,
                    prompt_ids=prompt_ids,
                    sampling_params={
                        **sampling_params,
                        "max_tokens": runtime.max_response_length,
                        **({} if seed is None else {"seed": seed}),
                    },
                )
                episode.generate_s += time.perf_counter() - started
                episode.preempted += max(0, output.num_preempted or 0)
                episode.weight_steps += [
                    step
                    for key in ("min_global_steps", "max_global_steps")
                    if (step := output.extra_fields.get(key)) is not None
                ]
                response_ids = list(output.token_ids)[: runtime.max_response_length]

                answer = parse_action(
                    self.tokenizer.decode(response_ids, skip_special_tokens=True),
                    think=settings.prompt.think,
                    tags=runtime.prompts.action_tags,
                )
                action = answer.action
                if action is not None and (state.admissible_actions or state.action_forms):
                    matched = match_admissible(action, state.admissible_actions, state.action_forms)
                    info.inadmissible = matched is None
                    action = matched or action
                info.unparsed = answer.action is None
                episode.turns.append(_Turn(prompt_ids, response_ids, output.log_probs, info))

                history.append((state.observation, action))
                started = time.perf_counter()
                state = await session.step(action or NO_ACTION)
                episode.env_s += time.perf_counter() - started
                episode.reward += state.reward
                if traced:
                    seen = shown.observation, action, state.observation, state.reward
                    info.text = turn_text(task, context.text, *seen)
                if state.done or state.success:
                    break
            episode.success = state.success
            episode.score = float(state.success) if state.score is None else state.score
        return episode

    def _student_prompt(self, runtime: Runtime, shown: TurnContext, skills: str) -> tuple[list[int], TurnContext, int]:
        ids, dropped = runtime.prompts.fit(
            shown, skills, limit=runtime.max_prompt_length, drop_history=True, option="data.max_prompt_length"
        )
        if dropped:
            # The teacher answers the student's question: it gets the history that the student got.
            shown = TurnContext(**{**shown.__dict__, "history": shown.history[dropped:]})
        return ids, shown, dropped

    def _teacher_prompt(
        self, runtime: Runtime, shown: TurnContext, context: Context, student_tokens: int, info: RowInfo
    ) -> None:
        info.skills = context.names
        info.no_match = context.no_match
        if not context.text:
            return
        teacher = runtime.sdar.teacher
        try:
            ids, dropped = runtime.prompts.fit(
                shown,
                context.text,
                limit=teacher.max_prompt_length,
                drop_history=teacher.on_long_prompt == "drop_history",
                option="sdar.teacher.max_prompt_length",
            )
        except PromptTooLong as error:
            info.truncated = True
            if teacher.on_long_prompt != "mask":
                # The trainer stops the run with this text: raising here would only cost the group.
                info.error = (
                    f"teacher prompt with skills {', '.join(context.names)}: {error}; or choose what happens then: "
                    "sdar.teacher.on_long_prompt=drop_history or mask"
                )
            return
        info.truncated = dropped > 0
        info.context_tokens = len(ids) - student_tokens
        info.teacher_prompt_ids = np.asarray(ids, dtype=np.int32)

    def _rows(self, episode: _Episode, task: Task, arm: str | None) -> list[AgentLoopOutput]:
        steps = episode.weight_steps or [0]
        outcome = self._outcome(task, arm, episode)
        metrics = AgentLoopMetrics(
            generate_sequences=episode.generate_s, tool_calls=episode.env_s, num_preempted=episode.preempted
        )
        rows = []
        for turn in episode.turns:
            turn.info.success = episode.success
            turn.info.score = episode.score
            # A server that was cut off before its first token leaves nothing to train on: one masked token keeps shape.
            empty = not turn.response_ids
            rows.append(
                AgentLoopOutput(
                    prompt_ids=turn.prompt_ids,
                    response_ids=[self.tokenizer.eos_token_id] if empty else turn.response_ids,
                    response_mask=[0] if empty else [1] * len(turn.response_ids),
                    response_logprobs=self._log_probs(turn, empty),
                    reward_score=episode.reward,
                    num_turns=len(episode.turns),
                    metrics=metrics,
                    extra_fields={
                        "min_global_steps": min(steps),
                        "max_global_steps": max(steps),
                        "reward_extra_info": outcome,
                        ROW_KEY: turn.info.as_dict(),
                    },
                )
            )
        return rows

    def _log_probs(self, turn: _Turn, empty: bool) -> list[float] | None:
        if not self.rollout_config.calculate_log_probs:
            return None
        return [0.0] if empty else list(turn.log_probs or [])[: len(turn.response_ids)]

    def _failed_row(
        self,
        task: Task,
        arm: str | None,
        kwargs: dict[str, Any],
        error: str | None = None,
        failure: str | None = None,
    ) -> AgentLoopOutput:
        step = int(kwargs.get("global_steps") or 0)
        eos = self.tokenizer.eos_token_id
        info = RowInfo(turn=0, task_type=task.task_type, failed=True, failure=failure, error=error)
        return AgentLoopOutput(
            prompt_ids=[eos],
            response_ids=[eos],
            response_mask=[0],
            response_logprobs=[0.0] if self.rollout_config.calculate_log_probs else None,
            reward_score=0.0,
            num_turns=0,
            metrics=AgentLoopMetrics(),
            extra_fields={
                "min_global_steps": step,
                "max_global_steps": step,
                "reward_extra_info": self._outcome(task, arm, None, error),
                ROW_KEY: info.as_dict(),
            },
        )

    @staticmethod
    def _outcome(task: Task, arm: str | None, episode: _Episode | None, error: str | None = None) -> dict[str, Any]:
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
        }
