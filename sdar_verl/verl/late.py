"""Which late contexts a run has, who writes for them, and how it makes their prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sdar_verl.config import SdarConfig
from sdar_verl.context.builder import ContextBuilder
from sdar_verl.recipe import plays_environments
from sdar_verl.rollout.control import control_strings_of
from sdar_verl.rollout.late_context import LateContexts, LatePrompts, TurnPrompts
from sdar_verl.rollout.runtime import make_prompts
from sdar_verl.verl.recipe_prompts import LateTeacherPrompts, TeacherPrompts, model_type
from sdar_verl.writer.base import Writer
from sdar_verl.writer.endpoint import EndpointWriter
from sdar_verl.writer.policy import PolicyWriter
from sdar_verl.writer.step import StepWriting


def late_contexts(
    config: DictConfig, sdar: SdarConfig, tokenizer: Any, writing: Callable[[], StepWriting]
) -> LateContexts | None:
    """The run's, or None where the agent loop makes the teacher's prompts.

    Args:
        config: verl's whole config.
        sdar: its ``sdar`` node.
        tokenizer: of the policy.
        writing: gives the way to the run's writer, where a context needs one.
    """
    contexts = ContextBuilder(sdar.context, tokenizer)
    if not contexts.late:
        return None
    prompts: LatePrompts
    if plays_environments(config):
        prompts = TurnPrompts(sdar, make_prompts(config, sdar, tokenizer))
    else:
        prompts = LateTeacherPrompts(TeacherPrompts(config, sdar, tokenizer, model_type(config)))
    return LateContexts(sdar, contexts, prompts, writing() if contexts.writes else None)


def step_writing(config: DictConfig, tokenizer: Any, writer: Writer) -> StepWriting:
    """A way to the run's writer, with counts of its own."""
    return StepWriting(writer, control_strings_of(tokenizer, config.data.get("apply_chat_template_kwargs", None)))


def run_writer(config: DictConfig, sdar: SdarConfig, tokenizer: Any, client: Callable[[], Any]) -> Writer:
    """Who writes; one of a run, for it keeps what was paid for.

    Args:
        config: verl's whole config.
        sdar: its ``sdar`` node.
        tokenizer: of the policy.
        client: gives verl's client of the rollout servers.
    """
    settings = sdar.context.writer
    if settings.source == "endpoint":
        folder = Path(str(config.trainer.default_local_dir))
        count_tokens = ContextBuilder(sdar.context, tokenizer).count_tokens
        return EndpointWriter(settings, folder, count_tokens, sdar.rollout.seed)
    return PolicyWriter(
        client,
        tokenizer,
        settings,
        prompt_tokens=int(config.data.max_prompt_length),
        answer_tokens=int(config.data.max_response_length),
        temperature=float(config.actor_rollout_ref.rollout.temperature),
        seed=sdar.rollout.seed,
        server=config.actor_rollout_ref.rollout.name,
        chat_template_kwargs=config.data.get("apply_chat_template_kwargs", None),
    )
