"""Checks of ``sdar.teacher.placement=rollout_server``: which engines can score a prompt, and what no server can do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sdar_verl.algorithm.divergences import SUPPORT_OF
from sdar_verl.config import SdarConfig
from sdar_verl.context.builder import is_late, late_options
from sdar_verl.context.registry import ContextError
from sdar_verl.requests import distribution_option, reads_distributions, server_support

TEMPERATURE_ONE = ("vllm", "sglang")
"""Engines that take a prompt's log-probs at temperature 1, whatever is asked: vLLM's prompt tokens skip the sampler, in
every logprobs_mode, and SGLang's input log-probs do not read the temperature."""

SCORING_ENGINES = (*TEMPERATURE_ONE, "transformers")
"""Values of ``rollout.name`` whose server in verl answers ``prompt_logprobs``; TensorRT-LLM's does not."""

VLLM_MOST = 20
"""vLLM's own ``max_logprobs``."""

_PLACEMENT = "sdar.teacher.placement=rollout_server"
_REMEDY = "sdar.teacher.placement=colocated"


def rollout_server_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every fault, one line each; ``config`` is verl's whole config."""
    return [*_needs(config, sdar), *_engine(config, sdar), *_room(config, sdar)]


def _needs(config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    """What is not known, or not the same, when an episode ends."""
    loss = sdar.loss
    if reads_distributions(loss) and (loss.support != "top_k" or SUPPORT_OF.get(loss.objective) != "teacher"):
        about = "the student's likeliest tokens" if loss.support == "top_k" else "all tokens"
        yield (
            f"{_PLACEMENT} gives log-probs of the sampled tokens and of the teacher's own likeliest, but "
            f"{distribution_option(loss)} reads the teacher's of {about}; use {_REMEDY}, or "
            "objective=forward_kl with support=top_k, or objective=sampled, k1, k2 or k3 without an anchor"
        )
    try:
        late = is_late(sdar.context)
    except ContextError:
        late = False  # an unknown name, told by the context's own checks
    if late:
        yield (
            f"{_PLACEMENT} asks during the rollout, but {late_options(sdar.context)} is known only when a group has "
            f"ended; use {_REMEDY}, or another context"
        )
    if sdar.context.turns_share is not None:
        yield (
            f"{_PLACEMENT} asks during the rollout, but which turns are left by "
            f"sdar.context.turns_share={sdar.context.turns_share} is known only after it; use {_REMEDY}, or null"
        )
    mode = str(config.trainer.v1.trainer_mode)
    if mode.endswith("_async"):
        yield (
            f"{_PLACEMENT} takes the rollout's weights for those that the step begins with, which "
            f"trainer.v1.trainer_mode={mode} does not keep equal; use {_REMEDY}, or trainer_mode=sdar"
        )


def _engine(config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    name, temperature = rollout.name, rollout.temperature
    if name not in SCORING_ENGINES:
        yield (
            f"{_PLACEMENT} needs an engine that answers prompt_logprobs in verl, and "
            f"actor_rollout_ref.rollout.name={name} does not; use {_REMEDY}, or rollout.name="
            f"{' or '.join(SCORING_ENGINES)}"
        )
    if name in TEMPERATURE_ONE and temperature != 1.0:
        yield (
            f"{_PLACEMENT}: {name} takes a prompt's log-probs at temperature 1, but "
            f"actor_rollout_ref.rollout.temperature={temperature}, at which student and teacher are compared; use "
            f"{_REMEDY}, or temperature=1.0"
        )
    asked, given = server_support(sdar), OmegaConf.select(rollout, "engine_kwargs.vllm.max_logprobs")
    given = VLLM_MOST if given is None else given
    if name == "vllm" and isinstance(given, int) and 0 <= given < asked:
        yield (
            f"{_PLACEMENT}: vLLM is asked for sdar.loss.top_k={asked} tokens and gives max_logprobs={given} at most; "
            "lower sdar.loss.top_k, which is cheaper for its one process, or set "
            f"++actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs={asked}"
        )
    if str(rollout.get("logprobs_mode", None)).endswith("_logits"):
        yield (
            f"{_PLACEMENT}: actor_rollout_ref.rollout.logprobs_mode={rollout.logprobs_mode} answers with logits; "
            "set it to processed_logprobs"
        )
    if rollout.get("quantization", None) is not None:
        yield (
            f"{_PLACEMENT}: with actor_rollout_ref.rollout.quantization={rollout.quantization} the server's weights "
            f"are not the actor's; use {_REMEDY}, or quantization=null"
        )
    if (rollout.get("disaggregation", None) or {}).get("enabled", False):
        yield (
            f"{_PLACEMENT} is not available with actor_rollout_ref.rollout.disaggregation.enabled=True: a prompt and "
            f"its answer are computed by different servers; use {_REMEDY}, or enabled=False"
        )


def _room(config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    """A scored row and the one token that must be asked for have to fit into the engine's context."""
    rollout = config.actor_rollout_ref.rollout
    needed = sdar.teacher.max_prompt_length + config.data.max_response_length + 1
    asked = {"actor_rollout_ref.rollout.max_model_len": rollout.get("max_model_len", None)}
    if asked["actor_rollout_ref.rollout.max_model_len"] is None:
        asked = {"max_position_embeddings of actor_rollout_ref.model.path": _positions(config)}
    for name, room in asked.items():
        if room is not None and room < needed:
            yield (
                f"{_PLACEMENT}: {name}={room} is less than the longest teacher row and one token, "
                f"sdar.teacher.max_prompt_length + data.max_response_length + 1 = {needed}; raise max_model_len, lower "
                f"sdar.teacher.max_prompt_length, or use {_REMEDY}"
            )


def _positions(config: DictConfig) -> int | None:
    """The model's longest context as its ``config.json`` says; None when it is not on this machine or does not say."""
    model = config.actor_rollout_ref.model
    file = Path(str(model.get("hf_config_path", None) or model.path)) / "config.json"
    if not file.is_file():
        return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    return settings.get("max_position_embeddings") or settings.get("text_config", {}).get("max_position_embeddings")
