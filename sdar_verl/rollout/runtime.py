"""What all episodes of one agent-loop process share: templates, skills and the pool of environment processes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from omegaconf import DictConfig

from sdar_verl.config import SdarConfig, ValidationArm, load_config
from sdar_verl.context.base import ContextRequest
from sdar_verl.context.builder import ContextBuilder
from sdar_verl.envs.base import Task
from sdar_verl.envs.pool import EnvPool
from sdar_verl.modules import import_modules
from sdar_verl.rollout.control import control_strings_of
from sdar_verl.rollout.prompt_builder import PromptBuilder
from sdar_verl.rollout.prompts import PromptTemplate
from sdar_verl.rollout.rows import AFTER, BEFORE
from sdar_verl.rollout.skills_of import SkillFinder
from sdar_verl.rollout.uids import request_seed


class Runtime:
    """Built once per process from the run's config."""

    def __init__(self, config: DictConfig, tokenizer: Any):
        self.sdar: SdarConfig = load_config(config.sdar)
        import_modules(self.sdar.modules)
        self.max_prompt_length = int(config.data.max_prompt_length)
        self.max_response_length = int(config.data.max_response_length)
        self.whole = self.sdar.rollout.rows == "trajectory"
        self.max_answer_length = (self.sdar.rollout.turn_length if self.whole else None) or self.max_response_length
        self._temperature = float(config.actor_rollout_ref.rollout.temperature)
        self.prompts = make_prompts(config, self.sdar, tokenizer)
        self.contexts = ContextBuilder(self.sdar.context, tokenizer)
        finder = SkillFinder(self.sdar.skills, self.contexts.count_tokens, self.sdar.env.name)
        self.bank, self.skills = finder.bank, finder.find

    @cached_property
    def pool(self) -> EnvPool:
        """Environment processes; started when the first episode asks for one."""
        env = self.sdar.env
        return EnvPool(
            env.name,
            env.options,
            processes=env.processes,
            envs_per_process=env.envs_per_process,
            reset_timeout_s=env.reset_timeout_s,
            step_timeout_s=env.step_timeout_s,
            env_modules=self.sdar.modules,
        )

    def request(self, task: Task, columns: Mapping[str, str] | None = None) -> ContextRequest:
        """What a context may read before the episode begins; ``columns``: see :meth:`SkillFinder.find`."""
        return ContextRequest(
            task,
            seed=self.sdar.context.seed,
            skills=lambda: self.skills(task, columns),
            count_tokens=self.contexts.count_tokens,
        )

    def arm(self, name: str) -> ValidationArm:
        """The validation arm called ``name``, or one of the two that judge learned skills."""
        if name in (BEFORE, AFTER):
            return ValidationArm(context="skills", temperature=self._temperature)
        return self.sdar.validation.arms[name]

    def traces(self, step: int | None) -> bool:
        """Whether the training rows of ``step`` carry the words of their turn."""
        every = self.sdar.trace.every
        return bool(every and step is not None and step % every == 0)

    def request_seed(self, *parts: object) -> int | None:
        """A sampling seed for one request, or None when the run does not fix seeds.

        Seeds are per request: one seed for a whole group would make its rollouts identical.
        """
        return request_seed(self.sdar.rollout.seed, *parts)


def make_prompts(config: DictConfig, sdar: SdarConfig, tokenizer: Any) -> PromptBuilder:
    """The run's prompts; agent loop and trainer make the same.

    Raises:
        PromptTemplateError: see :meth:`PromptTemplate.load` and :meth:`PromptBuilder.check`.
    """
    arguments = config.data.get("apply_chat_template_kwargs", {})
    template = PromptTemplate.load(sdar.prompt.template, control_strings_of(tokenizer, arguments))
    prompts = PromptBuilder(tokenizer, template, arguments, sdar.prompt.skill_position)
    prompts.check(conversation=sdar.rollout.rows == "trajectory")
    return prompts


_runtime: tuple[DictConfig, Runtime] | None = None


def get_runtime(config: DictConfig, tokenizer: Any) -> Runtime:
    """The process's runtime; verl makes an agent loop per trajectory, these things are made once."""
    global _runtime
    if _runtime is None or _runtime[0] is not config:
        _runtime = (config, Runtime(config, tokenizer))
    return _runtime[1]
