"""Any of verl's agent loops, with the teacher's prompt beside its rows.

A training row of a recipe that is not ours goes to this loop (:func:`teach`), which runs the loop that the row names
and adds to each of its outputs the same prompt with the privileged context in it. The loop's own messages and tools are
taken as it gave them to verl's tokenisation, and go through the same one again. The response stays as it is: sampled
tokens and tool answers, verbatim.
"""

from __future__ import annotations

import copy
import logging
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
from tensordict import TensorDict
from verl.experimental.agent_loop import agent_loop as verl_loops
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register
from verl.utils import tensordict_utils as tu

from sdar_verl.config import SdarConfig, load_config
from sdar_verl.context.registry import ContextError
from sdar_verl.envs.base import Task
from sdar_verl.recipe import INNER_COLUMN, TAUGHT
from sdar_verl.requests import server_support
from sdar_verl.rollout import outputs  # the module: verl loads this one while that one is being imported
from sdar_verl.rollout.messages import MessagesError, asks
from sdar_verl.rollout.prompts import PromptTemplateError
from sdar_verl.rollout.recipe_rows import record_of, said, task_of
from sdar_verl.rollout.rows import RETIRED_COLUMN, ROW_KEY, TRACED_COLUMN, RowInfo
from sdar_verl.rollout.server_teacher import ServerTeacher
from sdar_verl.rollout.uids import request_seed, seed_part, seeded
from sdar_verl.skills.retrieval import RetrievalError
from sdar_verl.verl import symbols
from sdar_verl.verl.recipe_prompts import Built, RecipeRuntime

symbols.check("loops")

logger = logging.getLogger(__name__)

FOREIGN = (
    "agent loop {loop} makes a prompt that verl's own tokenisation does not make of its messages ({why}), so the "
    "teacher's cannot be made of them; let the loop give it as extra_fields['teacher_prompt_ids'] of its outputs, or "
    "leave such rows out of the distillation term with sdar.context.on_foreign_prompt=mask (of a prompt that was cut: "
    "raise data.max_prompt_length, or set data.filter_overlong_prompts=True)"
)


def teach(batch: TensorDict, default: str) -> None:
    """Send the prompts of ``batch`` through :class:`TaughtLoop`, to the loops that they name or the ``default`` one."""
    names = list(batch["agent_name"]) if "agent_name" in batch else [default] * len(batch)
    tu.assign_non_tensor_stack(batch, INNER_COLUMN, names)
    tu.assign_non_tensor_stack(batch, "agent_name", [TAUGHT] * len(batch))


class _Recording:
    """In front of an agent loop's class: notes each prompt that verl's tokenisation makes."""

    built: list[Built]

    async def ct_build_initial_tokens(self, messages: Any, tools: Any = None, **kwargs: Any) -> list[int]:
        said = copy.deepcopy(list(messages))
        ids = await super().ct_build_initial_tokens(messages, tools=tools, **kwargs)  # type: ignore[misc]
        self.built.append(Built(said, tools, list(ids)))
        return ids

    async def apply_chat_template(self, messages: Any, tools: Any = None, **kwargs: Any) -> list[int]:
        """verl 0.9.0's name of it."""
        said = copy.deepcopy(list(messages))
        ids = await super().apply_chat_template(messages, tools=tools, **kwargs)  # type: ignore[misc]
        self.built.append(Built(said, tools, list(ids)))
        return ids


def recorded(kind: str, **given: Any) -> Any:
    """An agent loop of the class at ``kind``, which notes the prompts that it has tokenised."""
    loop_class = hydra.utils.get_class(kind)
    built: list[Built] = []
    given |= {"tokenizer": _recording(given["tokenizer"], built)}
    loop = type(f"Recorded{loop_class.__name__}", (_Recording, loop_class), {})(**given)
    loop.built = built
    return loop


def _recording(tokenizer: Any, built: list[Built]) -> Any:
    """``tokenizer`` for one loop, whose chat template notes what it encodes: loops of others call it themselves."""

    def apply_chat_template(conversation: Any, tools: Any = None, **kwargs: Any) -> Any:
        said = copy.deepcopy(conversation)
        made = tokenizer.apply_chat_template(conversation, tools=tools, **kwargs)
        ids = made["input_ids"] if isinstance(made, Mapping) else made
        if isinstance(ids, list) and ids and isinstance(ids[0], int) and asks(said):
            built.append(Built([dict(message) for message in said], tools, list(ids)))
        return made

    own = copy.copy(tokenizer)
    own.apply_chat_template = apply_chat_template
    return own


_NO_PROMPT = (ContextError, RetrievalError, MessagesError, PromptTemplateError)
"""A context cannot be made, or not be put into a row's messages."""

_runtimes: dict[int, RecipeRuntime] = {}


@register(TAUGHT)
class TaughtLoop(AgentLoopBase):
    """Runs the loop that the row names, and adds the teacher's prompt to its outputs."""

    def __init__(self, **given: Any):  # verl's own initialiser is the inner loop's affair
        self._given = given
        self.config = given["trainer_config"].config
        self.tokenizer: Any = given["tokenizer"]

    async def run(  # type: ignore[override]
        self, sampling_params: dict[str, Any], **columns: Any
    ) -> AgentLoopOutput | list[AgentLoopOutput]:
        """Play one row of the user's data.

        Args:
            sampling_params: verl's; a validation arm replaces the temperature.
            **columns: the row's.
        """
        name, arm_name = columns.pop(INNER_COLUMN), columns.pop("sdar_arm", None) or None
        traced, retired = bool(columns.pop(TRACED_COLUMN, False)), bool(columns.pop(RETIRED_COLUMN, False))
        task = task_of(columns)
        try:
            runtime = self._runtime()
            loop = self._loop(name)
        except Exception as error:
            # Every row of this process meets it. Raised, it would cost the groups alone, and say little.
            fault = f"{type(error).__name__} in agent loop {name!r} on {platform.node()}: {error}"
            return self._failed(task, arm_name, columns, error=fault)
        if arm_name is not None:
            arm = runtime.sdar.validation.arms[arm_name]
            try:
                shown = runtime.shown(task, arm.context)
                columns["raw_prompt"] = runtime.prompts.place.put(list(columns["raw_prompt"]), shown)
            except _NO_PROMPT as error:
                why = f"sdar.validation.arms.{arm_name}: row {said(task.task_id, task.description)}: {error}"
                return self._failed(task, arm_name, columns, error=why)
            sampling_params = {**sampling_params, "temperature": arm.temperature}
        submitted = seed_part(columns.get("uid"), columns.get("global_steps"))
        seed = request_seed(runtime.sdar.rollout.seed, task.task_id, arm_name, submitted, columns.get("session_id"))
        try:
            server = self.config.actor_rollout_ref.rollout.name
            output = await loop.run(seeded(sampling_params, seed, server), **columns)
        except Exception as error:
            logger.exception("agent loop %s, task %s", name, task.task_id)
            return self._failed(task, arm_name, columns, failure=f"{type(error).__name__} in {name}: {error}")
        if arm_name is not None:
            return output
        played = output if isinstance(output, list) else [output]
        scores = None if retired else self._server(runtime, columns)
        rows, turn = [], 0
        for one in played:
            late = runtime.contexts.late
            words = self.tokenizer if traced or late else None
            info = record_of(task, turn, one.prompt_ids, one.response_ids, one.response_mask, words, keep_data=late)
            turn += max(1, len(info.steps))
            if not traced:
                for step in info.steps:
                    step.text = None
            try:
                if not retired:
                    self._teach(runtime, name, loop.built, one, info, task)
            except _NO_PROMPT as error:
                info.error = f"row {said(task.task_id, task.description)}: {error}"
            if scores is not None:
                scores.ask(info, one.prompt_ids, one.response_ids)
            rows.append((one, info))
        if scores is not None:
            waited = await scores.collect()
            if rows[0][1].episode is not None:
                rows[0][1].episode.teacher_wait_s = waited
        return [self._row(runtime.sdar, one, info) for one, info in rows]

    def _failed(self, task: Task, arm: str | None, columns: Mapping[str, Any], **why: str) -> list[AgentLoopOutput]:
        """The masked row of an episode that could not be played, so that its group goes on without it."""
        sdar, rollout = load_config(self.config.sdar), self.config.actor_rollout_ref.rollout
        maker = outputs.OutputMaker(
            self.tokenizer.eos_token_id,
            log_probs=rollout.calculate_log_probs,
            sdar=sdar,
        )
        step = max(int(columns.get("global_steps") or 0) - (arm is None), 0)
        return [maker.failed_row(task, arm, step, **why)]

    def _runtime(self) -> RecipeRuntime:
        key = id(self.config)
        if key not in _runtimes:
            _runtimes[key] = RecipeRuntime(self.config, self.tokenizer, self._given.get("hf_model_type"))
        return _runtimes[key]

    def _loop(self, name: str) -> Any:
        registry = verl_loops._agent_loop_registry
        if name not in registry:
            raise ValueError(f"agent loop {name!r} is not registered; known: {', '.join(sorted(registry))}")
        options = dict(registry[name])
        kind = options.pop("_target_")
        if not options:  # Hydra would merge what is given into a config first, for every episode
            return recorded(kind, **self._given)
        entry = {**options, "_target_": f"{__name__}.{recorded.__name__}", "kind": kind}
        return hydra.utils.instantiate(entry, **self._given)

    def _server(self, runtime: RecipeRuntime, columns: Mapping[str, Any]) -> ServerTeacher | None:
        teacher, rollout = runtime.sdar.teacher, self.config.actor_rollout_ref.rollout
        if teacher.placement != "rollout_server":
            return None
        checks = columns.get("session_id") == 0 and teacher.sanity_check
        asked = server_support(runtime.sdar)
        return ServerTeacher(
            self._given["server_manager"], rollout.name, rollout.temperature, checks=checks, likeliest=asked
        )

    def _teach(
        self, runtime: RecipeRuntime, loop: str, built: Sequence[Built], one: AgentLoopOutput, info: RowInfo, task: Task
    ) -> None:
        """The teacher's prompt of one output, or why there is none."""
        given = one.extra_fields.pop("teacher_prompt_ids", None)
        if given is not None:
            info.take_teacher_prompt(given)
            return
        if one.multi_modal_data:
            kinds = ", ".join(name for name, values in one.multi_modal_data.items() if values is not None)
            if kinds:
                raise MessagesError(f"the prompt has {kinds}; a privileged teacher reads text alone")
        ids = list(one.prompt_ids)
        found = max((b for b in built if ids[: len(b.ids)] == b.ids), key=lambda b: len(b.ids), default=None)
        why = "" if found is not None else "its prompt is none of those that it had tokenised"
        if found is not None and not runtime.prompts.repeats(found):
            why = "another tokenisation, or a prompt cut to data.max_prompt_length"
        if why:
            if runtime.sdar.context.on_foreign_prompt == "error":
                info.error = f"row of {said(task.task_id, task.description)}: " + FOREIGN.format(loop=loop, why=why)
            info.foreign = True
            return
        assert found is not None
        rest = ids[len(found.ids) :]
        if runtime.contexts.late:
            info.built = {"messages": found.messages, "tools": found.tools, "rest": rest}
            if info.episode is not None:
                early = runtime.contexts.early_passages(runtime.request(task))
                info.episode.passages = {name: vars(passage) for name, passage in early.items()}
            return
        passage = runtime.early(task)
        info.context_empty = passage is None
        if passage is None:
            if runtime.sdar.context.on_empty == "error":
                raise ContextError(
                    f"sdar.context.sources={runtime.sdar.context.sources} find nothing to show the teacher; leave such "
                    "rows out of the distillation term with sdar.context.on_empty=mask"
                )
            return
        info.skills, info.no_match = passage.skills, passage.no_match
        info.skills_dropped, info.teachers = passage.dropped, runtime.contexts.teachers(task)
        runtime.prompts.add(info, found.messages, found.tools, rest, passage)
        if info.episode is not None and info.teacher_prompt_tokens is not None:
            info.episode.context = passage.text
        for step in info.steps:
            if step.text is not None:
                step.text["context"] = passage.text

    @staticmethod
    def _row(sdar: SdarConfig, one: AgentLoopOutput, info: RowInfo) -> AgentLoopOutput:
        columns = outputs.teacher_columns(info, one.response_mask, sdar)
        fields = {**one.__dict__, "extra_fields": {**one.extra_fields, ROW_KEY: info.as_dict()}, "columns": columns}
        return outputs.RowOutput.model_construct({*one.model_fields_set, "extra_fields", "columns"}, **fields)
