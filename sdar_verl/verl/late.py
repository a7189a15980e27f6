"""Which late contexts a run has, and how it makes their prompts."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from sdar_verl.config import SdarConfig
from sdar_verl.context.builder import ContextBuilder
from sdar_verl.recipe import plays_environments
from sdar_verl.rollout.late_context import LateContexts, LatePrompts, TurnPrompts
from sdar_verl.rollout.runtime import make_prompts
from sdar_verl.verl.recipe_prompts import LateTeacherPrompts, TeacherPrompts, model_type


def late_contexts(config: DictConfig, sdar: SdarConfig, tokenizer: Any) -> LateContexts | None:
    """The run's, or None where the agent loop makes the teacher's prompts."""
    contexts = ContextBuilder(sdar.context, tokenizer)
    if not contexts.late:
        return None
    prompts: LatePrompts
    if plays_environments(config):
        prompts = TurnPrompts(sdar, make_prompts(config, sdar, tokenizer))
    else:
        prompts = LateTeacherPrompts(TeacherPrompts(config, sdar, tokenizer, model_type(config)))
    return LateContexts(sdar, contexts, prompts)
