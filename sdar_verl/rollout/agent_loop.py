"""The agent loop ``sdar_agent``: an LLM acts in a text environment for several turns; each turn becomes a training row,
or the whole conversation does (``sdar.rollout.rows``).

Beside the student's prompt every row carries the teacher's: the same turn with the skill slot filled. The teacher's
log-probs are computed later, by the trainer, on the very response ids sampled here; or meanwhile, by the rollout server
(``sdar.teacher.placement=rollout_server``).
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register

from sdar_verl.config import ValidationArm
from sdar_verl.context.base import Passage
from sdar_verl.context.builder import join
from sdar_verl.context.registry import ContextError
from sdar_verl.envs.base import NO_ACTION, Step, Task
from sdar_verl.envs.pool import EnvError, EnvProcessError
from sdar_verl.panels import task_from_json
from sdar_verl.requests import server_support
from sdar_verl.rollout import outputs  # the module: verl loads this one while that one is being imported
from sdar_verl.rollout.actions import last_line, match_admissible, parse_action
from sdar_verl.rollout.prompt_builder import PromptTooLong, TurnView
from sdar_verl.rollout.prompts import PromptTemplateError
from sdar_verl.rollout.rows import RETIRED_COLUMN, SKILL_COLUMNS, TRACED_COLUMN, EpisodeNote, RowInfo, turn_text
from sdar_verl.rollout.runtime import Runtime, get_runtime
from sdar_verl.rollout.server_teacher import ServerTeacher
from sdar_verl.rollout.teacher_prompt import add_teacher_prompt
from sdar_verl.rollout.uids import seed_part, seeded
from sdar_verl.skills.retrieval import RetrievalError

logger = logging.getLogger(__name__)

NO_TEXT = Passage("")
NO_TASK = Task("", "", "", "")

SETUP_FAULTS = (EnvError, PromptTooLong, PromptTemplateError, RetrievalError, ContextError)


class ServerFailed(Exception):
    """The rollout server raised instead of answering."""


@dataclass(frozen=True)
class _Texts:
    """Contexts of one episode.

    Attributes:
        student: text in the student's prompt; empty without.
        teacher: what the teacher sees; None when it has no say, or when the trainer makes its prompts (``late``).
        empty: it has no say because its sources found nothing.
        found: whose skills and matches are counted.
        passages: early contexts by name, kept for the trainer.
        late: the trainer makes the teacher's prompts.
        teachers: the source whose teacher it is, where each has one.
    """

    student: str = ""
    teacher: Passage | None = None
    found: Passage = NO_TEXT
    passages: dict[str, Passage] = field(default_factory=dict)
    late: bool = False
    empty: bool = False
    teachers: tuple[str, ...] = ()


@register("sdar_agent")
class SdarAgentLoop(AgentLoopBase):
    """One episode: reset, then prompt, sample, parse, step until the environment or ``sdar.env.max_steps`` ends it."""

    tokenizer: Any  # verl's annotation names the factory, not a tokenizer

    def __init__(self, trainer_config: Any, server_manager: Any, tokenizer: Any, **kwargs: Any):
        # verl's own initialiser builds a token merger for the model's family, per trajectory, which makes demands on
        # the tokenizer. Here prompts are encoded once and conversations grow by PromptBuilder.follow_up; so it is not
        # called.
        self.config = trainer_config.config
        self.rollout_config = self.config.actor_rollout_ref.rollout
        self.server_manager = server_manager
        self.tokenizer = tokenizer
        self.outputs = outputs.OutputMaker(
            tokenizer.eos_token_id,
            log_probs=self.rollout_config.calculate_log_probs,
            sdar=self.config.sdar,
        )

    async def run(  # type: ignore[override]  # verl's worker takes lists, its annotation has not followed
        self, sampling_params: dict[str, Any], **kwargs: Any
    ) -> list[AgentLoopOutput]:
        """Play the task of this dataset row.

        Args:
            sampling_params: verl's; a validation arm replaces the temperature.
            **kwargs: the row's columns, ``task`` among them (a JSON object, see ``sdar_verl.panels``).

        Returns:
            One output per turn, the episode's reward on each, or one for the whole conversation. An episode comes back
            as one masked row, so that its group goes on without it, when its environment process failed twice, the
            rollout server raised, or anything else did.
        """
        arm_name = kwargs.get("sdar_arm")
        # The weights at hand: a training step's prompts are played with those of the step before.
        version = max(int(kwargs.get("global_steps") or 0) - (arm_name is None), 0)
        try:
            task = task_from_json(kwargs["task"])
            runtime = get_runtime(self.config, self.tokenizer)
        except Exception as error:
            # Whatever it is, every episode of this process meets it: a bank that only other nodes see, a package that
            # is missing on this one. Raised, it would cost the groups, and training would go on with the other nodes'.
            fault = f"{type(error).__name__} in an agent loop on {platform.node()}: {error}"
            return [self.outputs.failed_row(NO_TASK, arm_name, version, error=fault)]
        arm = runtime.arm(arm_name) if arm_name is not None else None
        if arm is not None:
            sampling_params = {**sampling_params, "temperature": arm.temperature}
        submitted = seed_part(kwargs.get("uid"), kwargs.get("global_steps"))
        seed_parts = (task.task_id, arm_name, submitted, kwargs.get("session_id"))

        traced = arm is None and (runtime.traces(kwargs.get("global_steps")) or bool(kwargs.get(TRACED_COLUMN)))
        taught = arm is None and runtime.sdar.teacher.source != "none" and not kwargs.get(RETIRED_COLUMN)
        columns = {name: kwargs[name] for name in SKILL_COLUMNS if kwargs.get(name)}
        failure = ""
        for attempt in (1, 2):
            scores = self._scores(runtime, first=kwargs.get("session_id") == 0) if taught else None
            try:
                episode = await self._play(
                    runtime, task, arm, sampling_params, seed_parts, traced, columns, taught, scores
                )
                break
            except EnvProcessError as error:
                logger.warning("task %s, attempt %d: %s", task.task_id, attempt, error)
                failure = str(error)
            except ServerFailed as error:
                return [self.outputs.failed_row(task, arm_name, version, failure=str(error))]
            except SETUP_FAULTS as error:
                # Not this episode's bad luck but a fault of the set-up. An exception here would only cost the group;
                # the trainer reads this text and stops.
                return [self.outputs.failed_row(task, arm_name, version, error=f"task {task.task_id}: {error}")]
            except Exception as error:
                # Raised, it would cost the group, and verl would offer to draw groups again for ever. As a lost episode
                # it is counted, and a run that loses most of them stops.
                logger.exception("task %s", task.task_id)
                failure = f"{type(error).__name__} in the agent loop: {error}"
                return [self.outputs.failed_row(task, arm_name, version, failure=failure)]
            finally:
                if scores is not None:
                    scores.cancel()
        else:
            return [self.outputs.failed_row(task, arm_name, version, failure=failure)]
        return self.outputs.rows(episode, task, arm_name, whole=runtime.whole)

    async def _play(
        self,
        runtime: Runtime,
        task: Task,
        arm: ValidationArm | None,
        sampling_params: dict[str, Any],
        seed_parts: tuple[Any, ...],
        traced: bool,
        columns: Mapping[str, str],
        taught: bool,
        scores: ServerTeacher | None,
    ) -> outputs.Episode:
        settings = runtime.sdar
        texts = self._texts(runtime, task, arm, columns, taught)
        note = EpisodeNote(asdict(task), passages={name: asdict(passage) for name, passage in texts.passages.items()})
        episode = outputs.Episode()
        history: list[tuple[str, str | None]] = []
        request_id = uuid4().hex
        async with runtime.pool.session(task) as session:
            started = time.perf_counter()
            state: Step = await session.reset()
            episode.env_s += time.perf_counter() - started
            for turn_index in range(settings.env.max_steps):
                shown = TurnView(
                    task=task.description,
                    history=tuple(history[-settings.prompt.history_length :] if settings.prompt.history_length else ()),
                    observation=state.observation,
                    admissible_actions=(*state.action_forms, *state.admissible_actions),
                    step=turn_index + 1,
                    max_steps=settings.env.max_steps,
                )
                if episode.turns and runtime.whole:
                    prompt_ids, dropped = self._follow_up(runtime, shown, episode), 0
                    if not prompt_ids:
                        episode.cut = True
                        break
                else:
                    prompt_ids, dropped = runtime.prompts.fit(
                        shown,
                        texts.student,
                        limit=runtime.max_prompt_length,
                        drop_history=True,
                        option="data.max_prompt_length",
                    )
                # The teacher answers the student's question: it gets the history that the student got.
                shown = replace(shown, history=shown.history[dropped:])
                info = self._info(task, shown, dropped, texts, len(prompt_ids))
                if turn_index == 0:
                    info.episode = note
                # In a conversation the context is in the first user turn, once.
                if texts.teacher is not None and (turn_index == 0 or not runtime.whole):
                    add_teacher_prompt(info, runtime.prompts, shown, texts.teacher, settings.teacher)
                    if turn_index == 0 and info.teacher_prompt_ids is not None:
                        note.context = texts.teacher.text

                seed = runtime.request_seed(*seed_parts, turn_index)
                turn = await self._ask(
                    request_id,
                    prompt_ids,
                    seeded(sampling_params, seed, self.config.actor_rollout_ref.rollout.name),
                    info,
                    episode,
                )
                episode.turns.append(turn)
                if scores is not None and not runtime.whole:
                    scores.ask(info, turn.prompt_ids, turn.response_ids)
                info.action = self._read_answer(runtime, turn, state)

                history.append((state.observation, info.action))
                started = time.perf_counter()
                state = await session.step(info.action or NO_ACTION)
                episode.env_s += time.perf_counter() - started
                episode.reward += state.reward
                if traced:
                    # A late context is filled in by the trainer.
                    context = texts.teacher.text if texts.teacher is not None else texts.student
                    info.text = turn_text(
                        task, context, shown.observation, info.action, state.observation, state.reward
                    )
                if state.done or state.success:
                    break
            episode.success = state.success
            episode.score = float(state.success) if state.score is None else state.score
        note.reward, note.last_observation = episode.reward, state.observation
        if scores is not None:
            if runtime.whole:
                first = episode.turns[0]
                scores.ask(first.info, first.prompt_ids, outputs.conversation(episode))
            note.teacher_wait_s = await scores.collect()
        return episode

    def _scores(self, runtime: Runtime, *, first: bool) -> ServerTeacher | None:
        """The teacher's side of an episode, where the rollout server scores for it; ``first``: of its group."""
        teacher, rollout = runtime.sdar.teacher, self.rollout_config
        if teacher.placement != "rollout_server":
            return None
        checks = first and teacher.sanity_check
        asked = server_support(runtime.sdar)
        return ServerTeacher(self.server_manager, rollout.name, rollout.temperature, checks=checks, likeliest=asked)

    @staticmethod
    def _follow_up(runtime: Runtime, shown: TurnView, episode: outputs.Episode) -> list[int]:
        """The conversation up to the next answer, earlier answers verbatim; empty when a whole answer has no room."""
        last = episode.turns[-1]
        if not last.response_ids:  # the server was cut off: nothing to go on from
            return []
        ids = [*last.prompt_ids, *last.response_ids]
        ids += runtime.prompts.follow_up(shown, ids[-1])
        used = len(ids) - len(episode.turns[0].prompt_ids)
        return ids if used + runtime.max_answer_length <= runtime.max_response_length else []

    @staticmethod
    def _texts(
        runtime: Runtime, task: Task, arm: ValidationArm | None, columns: Mapping[str, str], taught: bool
    ) -> _Texts:
        contexts, settings, request = runtime.contexts, runtime.sdar, runtime.request(task, columns)
        shows = settings.context.student if arm is None else arm.context
        if shows == "teacher":
            found = contexts.passage(request, contexts.early_passages(request))
            seen = contexts.controlled(found, task.task_id)
            return _Texts(seen.text if seen is not None else "", found=found)
        found = runtime.skills(task, columns) if shows == "skills" else NO_TEXT
        texts = _Texts(found.text, found=found)
        if not taught:
            return texts
        passages = contexts.early_passages(request)
        if contexts.late:
            return replace(texts, passages=passages, found=join([*passages.values()]), late=True)
        found = contexts.passage(request, passages)
        teacher = contexts.controlled(found, task.task_id)
        if teacher is None and settings.context.on_empty == "error":
            raise ContextError(
                f"sdar.context.sources={settings.context.sources} find nothing to show the teacher; give the task a "
                "context, or leave its rows out of the distillation term with sdar.context.on_empty=mask"
            )
        return replace(texts, teacher=teacher, found=found, empty=teacher is None, teachers=contexts.teachers(task))

    def _info(self, task: Task, shown: TurnView, dropped: int, texts: _Texts, prompt_tokens: int) -> RowInfo:
        return RowInfo(
            turn=shown.step - 1,
            task_type=task.task_type,
            task_id=task.task_id,
            observation=shown.observation,
            admissible_actions=shown.admissible_actions if texts.late else (),
            skills=texts.found.skills,
            no_match=texts.found.no_match,
            skills_dropped=texts.found.dropped,
            context_empty=texts.empty,
            teachers=texts.teachers,
            prompt_tokens=prompt_tokens,
            history_dropped=dropped,
        )

    async def _ask(
        self, request_id: str, prompt_ids: list[int], params: dict[str, Any], info: RowInfo, episode: outputs.Episode
    ) -> outputs.Turn:
        """Sample one answer; its costs are noted on ``episode``."""
        runtime = get_runtime(self.config, self.tokenizer)
        started = time.perf_counter()
        try:
            output = await self.server_manager.generate(
                request_id=request_id,
                prompt_ids=prompt_ids,
                sampling_params={**params, "max_tokens": runtime.max_answer_length},
            )
        except Exception as error:
            logger.exception("rollout server, request of %d tokens", len(prompt_ids))
            raise ServerFailed(f"the rollout server raised {type(error).__name__}: {error}") from error
        episode.generate_s += time.perf_counter() - started
        episode.preempted += max(0, output.num_preempted or 0)
        episode.weight_steps += [
            step
            for key in ("min_global_steps", "max_global_steps")
            if (step := output.extra_fields.get(key)) is not None
        ]
        return outputs.Turn(prompt_ids, list(output.token_ids)[: runtime.max_answer_length], output.log_probs, info)

    def _read_answer(self, runtime: Runtime, turn: outputs.Turn, state: Step) -> str | None:
        """The action to send, None where there is none; what was wrong with the answer is noted in its record."""
        prompts, tags = runtime.prompts, runtime.prompts.action_tags
        text = prompts.reader.text(turn.response_ids)
        answer = parse_action(text, think=runtime.sdar.prompt.think, tags=tags, opened=prompts.opens_thought)
        turn.info.unparsed, turn.info.parse_error = answer.action is None, answer.error
        if answer.action is None:
            return last_line(text, tags) if runtime.sdar.env.invalid_action == "last_line" else None
        if not (state.admissible_actions or state.action_forms):
            return answer.action
        matched = match_admissible(
            answer.action, state.admissible_actions, state.action_forms, shown=runtime.prompts.clean
        )
        turn.info.inadmissible = matched is None
        return matched or answer.action
