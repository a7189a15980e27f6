"""Prompts of a recipe that is not ours, as verl's agent loops make them of messages and tools: the student's, and the
same with a context in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.config import SdarConfig, load_config
from sdar_verl.context.base import ContextRequest, Passage
from sdar_verl.context.builder import ContextBuilder
from sdar_verl.envs.base import Task
from sdar_verl.modules import import_modules
from sdar_verl.rollout.messages import ContextPlace, last_user_text
from sdar_verl.rollout.recipe_rows import said
from sdar_verl.rollout.rows import RowInfo
from sdar_verl.rollout.skills_of import SkillFinder


@dataclass(frozen=True)
class Built:
    """What a loop gave to verl's tokenisation, and what came back."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    ids: list[int]


def prompt_maker(
    config: DictConfig, tokenizer: Any, model_type: str | None, **further: Any
) -> Callable[..., list[int]]:
    """``(messages, tools) -> ids`` as verl's agent loops make them of text, without their limit of length.

    Args:
        config: verl's whole config.
        tokenizer: of the policy.
        model_type: of its Hugging Face config.
        **further: arguments of the chat template beyond ``data.apply_chat_template_kwargs``.
    """
    given: Any = config.data.get("apply_chat_template_kwargs", None) or {}
    options: dict[str, Any] = dict(given) | further
    switch = config.data.get("continuous_token", None)  # of verl 0.9.0, off by default; later versions always do so
    if switch is not None and not switch.enable:
        from verl.utils.tokenizer import normalize_token_ids

        def plain(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
            return normalize_token_ids(
                tokenizer.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=True, tokenize=True, **options
                )
            )

        return plain
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    told: dict[str, Any] = {"hf_model_type": model_type}
    if switch is not None:
        model = config.actor_rollout_ref.model
        told = {"model_family": switch.model_family, "model_path": model.path}
        told["tokenizer_name_or_path"] = model.tokenizer_path
    builder = create_continuous_token_builder(tokenizer, chat_template_kwargs=options, **told)

    def make(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        return list(builder.build_initial_tokens(messages, tools=tools))

    return make


def policy_tokenizer(config: DictConfig) -> Any:
    """As verl's agent loops have it; of a model that lies here, nothing is downloaded."""
    from transformers import AutoTokenizer

    model = config.actor_rollout_ref.model
    trust, path = model.get("trust_remote_code", False), str(model.get("tokenizer_path") or model.path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust, local_files_only=True)
    if template := model.get("custom_chat_template", None):
        tokenizer.chat_template = template
    return tokenizer


def model_type(config: DictConfig) -> str | None:
    """As verl's agent loops read it off the model's config."""
    from transformers import AutoConfig
    from verl.utils.fs import copy_to_local

    model = config.actor_rollout_ref.model
    path = copy_to_local(model.get("hf_config_path", None) or model.path, use_shm=model.get("use_shm", False))
    described = AutoConfig.from_pretrained(path, trust_remote_code=model.get("trust_remote_code", False))
    found = getattr(described, "model_type", None)
    return found if isinstance(found, str) else None


def loop_names(config: DictConfig) -> set[str]:
    """Agent loops that are registered in this process, and those that ``agent_loop_config_path`` lists."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

    file = config.actor_rollout_ref.rollout.agent.get("agent_loop_config_path")
    listed: Any = OmegaConf.load(config_file(file)) if file else ()
    return {*_agent_loop_registry, *(str(entry.name) for entry in listed)}


def config_file(path: str) -> str:
    """Where verl finds a file that an option names: as it is written, or in verl's own package."""
    from verl.utils import import_utils

    # verl 0.9.0 takes a path as it is written.
    return str(getattr(import_utils, "resolve_config_path", str)(path))


def tool_schemas(config: DictConfig) -> list[dict[str, Any]] | None:
    """Of the tools that ``tool_agent`` puts into its prompts; None without tools."""
    from verl.tools.tool_registry import load_all_tools

    settings = config.actor_rollout_ref.rollout.multi_turn
    files = (settings.get("tool_config_path"), settings.get("function_tool_path"))
    found = load_all_tools(*(config_file(file) if file else None for file in files))
    return [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in found] or None


class TeacherPrompts:
    """Makes teacher prompts of a recipe's rows; agent loops and, for late contexts, the trainer have one.

    Args:
        config: verl's whole config.
        sdar: the ``sdar`` node.
        tokenizer: of the policy.
        model_type: of its Hugging Face config.
    """

    def __init__(self, config: DictConfig, sdar: SdarConfig, tokenizer: Any, model_type: str | None):
        further = sdar.context.chat_template_kwargs
        self._settings = sdar
        self._plain = prompt_maker(config, tokenizer, model_type)
        self._make = prompt_maker(config, tokenizer, model_type, **further) if further else self._plain
        self.place = ContextPlace(sdar.context.place, tokenizer, config.data.get("apply_chat_template_kwargs", None))

    def student(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> list[int]:
        """Token ids of the student's prompt, as verl's loops make them."""
        return self._plain(messages, tools)

    def teacher(self, messages: Sequence[Mapping[str, Any]], tools: Any, context: str) -> list[int]:
        """Token ids of the same prompt with ``context`` in it, as long as they come."""
        return self._make(self.place.put(messages, context), tools)

    def repeats(self, built: Built) -> bool:
        """Whether our call of verl's tokenisation gives what the loop's gave, token by token."""
        return self.student(built.messages, built.tools) == built.ids

    def add(
        self, info: RowInfo, messages: list[dict[str, Any]], tools: Any, rest: Sequence[int], passage: Passage
    ) -> None:
        """Fill in the teacher's prompt of a row.

        Args:
            info: the row's record.
            messages: the student's.
            tools: schemas in its system prompt, or None.
            rest: token ids of the student's prompt behind those of ``messages``.
            passage: the context; an empty text gives the student's own prompt.
        """
        limit = self._settings.teacher.max_prompt_length
        ids = [*self.teacher(messages, tools, passage.text), *rest]
        if len(ids) > limit:
            info.truncated = True
            if self._settings.teacher.on_long_prompt != "mask":
                info.error = (
                    f"the teacher's prompt of {said(info.task_id, last_user_text(messages))} has {len(ids)} tokens, "
                    "more than "
                    f"sdar.teacher.max_prompt_length={limit}; raise it, shorten the context, or leave such rows out of "
                    "the distillation term with sdar.teacher.on_long_prompt=mask"
                )
            return
        if passage.text and ids == [*self.student(messages, tools), *rest]:
            info.error = (
                f"the chat template shows nothing of a context at sdar.context.place={self._settings.context.place}: "
                f"the teacher's prompt of {said(info.task_id, last_user_text(messages))} is the student's. Use another "
                "place"
            )
            return
        info.take_teacher_prompt(ids)


class LateTeacherPrompts:
    """Of a recipe's rows, made by the trainer from what the agent loop has kept."""

    def __init__(self, prompts: TeacherPrompts):
        self._prompts = prompts

    def add(self, task: Task, infos: Sequence[RowInfo], index: int, passage: Passage) -> None:
        """Of :class:`sdar_verl.rollout.late_context.LatePrompts`."""
        info = infos[index]
        if info.built is not None:
            self._prompts.add(info, info.built["messages"], info.built["tools"], info.built["rest"], passage)


class RecipeRuntime:
    """What all rows of one process share: contexts, skills and the maker of teacher prompts."""

    def __init__(self, config: DictConfig, tokenizer: Any, model_type: str | None):
        self.sdar = load_config(config.sdar)
        import_modules(self.sdar.modules)
        self.contexts = ContextBuilder(self.sdar.context, tokenizer)
        self.prompts = TeacherPrompts(config, self.sdar, tokenizer, model_type)
        uses_skills = "skills" in self.sdar.context.named
        self.skills = SkillFinder(self.sdar.skills, self.contexts.count_tokens, None) if uses_skills else None

    def request(self, task: Task) -> ContextRequest:
        """What contexts may read before an episode ends."""
        skills = self.skills
        return ContextRequest(
            task,
            seed=self.sdar.context.seed,
            skills=None if skills is None else lambda: skills.find(task),
            count_tokens=self.contexts.count_tokens,
        )

    def shown(self, task: Task, context: str) -> str:
        """What a validation arm puts into the student's prompt: nothing, the skills, or all that the teacher sees."""
        if context == "none":
            return ""
        if context == "skills":
            return self.skills.find(task).text if self.skills is not None else ""  # a check before the start
        passage = self.early(task)
        return "" if passage is None else passage.text

    def early(self, task: Task) -> Passage | None:
        """What the teacher sees of a task before an episode ends; None where that is nothing."""
        request = self.request(task)
        found = self.contexts.passage(request, self.contexts.early_passages(request))
        return self.contexts.controlled(found, task.task_id)
