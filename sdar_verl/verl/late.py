"""Which late contexts a run has, and how it makes their prompts."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from sdar_verl.config import SdarConfig
from sdar_verl.context.builder import ContextBuilder
from sdar_verl.recipe import plays_environments
from sdar_verl.rollout.late_context import LateContexts, LatePrompts, TurnPrompts
from sdar_verl.rollout.runtime import make_prompts
from sdar_verl.verl.recipe_prompts import LateTeacherPrompts, TeacherPrompts


def late_contexts(config: DictConfig, sdar: SdarConfig, tokenizer: Any) -> LateContexts | None:
    """The run's, or None where the agent loop makes the teacher's prompts."""
    contexts = ContextBuilder(sdar.context, tokenizer)
    if not contexts.late:
        return None
    prompts: LatePrompts
    if plays_environments(config):
        prompts = TurnPrompts(sdar, make_prompts(config, sdar, tokenizer))
    else:
        prompts = LateTeacherPrompts(TeacherPrompts(config, sdar, tokenizer, _model_type(config)))
    return LateContexts(sdar, contexts, prompts)


def _model_type(config: DictConfig) -> str | None:
    """As verl's agent loops read it off the model's config."""
    from transformers import AutoConfig
    from verl.utils.fs import copy_to_local

    model = config.actor_rollout_ref.model
    path = copy_to_local(model.get("hf_config_path", None) or model.path, use_shm=model.get("use_shm", False))
    described = AutoConfig.from_pretrained(path, trust_remote_code=model.get("trust_remote_code", False))
    found = getattr(described, "model_type", None)
    return found if isinstance(found, str) else None
