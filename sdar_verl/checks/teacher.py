"""Checks of ``sdar.teacher`` before Ray starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.checks.engine import missing_model, sequence_parallel
from sdar_verl.checks.loss import needs_step_statistics
from sdar_verl.checks.rollout_server import rollout_server_faults
from sdar_verl.config import SdarConfig, TeacherConfig
from sdar_verl.teacher.sources import get_source, list_sources, uses_lora

_SOURCE_OPTIONS = ("path", "ema_decay", "update_every", "offload")
_POOL_OPTIONS = ("pool_gpus_per_node", "pool_nodes")
_WHY_NOT = {
    "pool": "which reads the actor's weights where they are",
    "rollout_server": "whose weights the rollout server does not hold: it has the actor's of the start of the step",
}


def teacher_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every fault of the teacher's settings, one message each."""
    settings = sdar.teacher
    if settings.source == "none":
        faults = _without_effect(settings, [*_SOURCE_OPTIONS, *_POOL_OPTIONS])
        if settings.placement != "colocated":
            faults.append(
                f"sdar.teacher.placement={settings.placement} has no effect with sdar.teacher.source=none; leave it at "
                "colocated"
            )
        return faults
    try:
        source = get_source(settings.source)
    except ValueError as error:
        return [f"sdar.teacher.source: {error}, none"]
    faults = _without_effect(settings, [name for name in _SOURCE_OPTIONS if name not in source.options])
    faults += _placement(settings, source.placements)
    faults += source.faults(config, settings)
    if settings.path is not None and "path" in source.options:
        faults += _vocabulary(config, settings.path)
    if source.per_update:
        faults += _needed_early(sdar)
        if sdar.on_nonfinite == "drop":
            faults.append(
                f"sdar.on_nonfinite=drop cannot leave rows out with sdar.teacher.source={settings.source}, which "
                "scores inside the update; use sdar.teacher.source=actor, or sdar.on_nonfinite=error"
            )
    if settings.on_long_prompt == "drop_history" and sdar.prompt.history_length == 0:
        faults.append(
            "sdar.teacher.on_long_prompt=drop_history has nothing to drop with sdar.prompt.history_length=0"
            + (" (sdar.rollout.rows=trajectory)" if sdar.rollout.rows == "trajectory" else "")
            + "; use error or mask"
        )
    faults += _positions(config, settings)
    if settings.placement == "rollout_server":
        return faults + rollout_server_faults(config, sdar)
    return faults + _budgets(config, settings, own_engine=source.own_engine)


def _without_effect(settings: TeacherConfig, names: list[str]) -> list[str]:
    faults = []
    for name in names:
        value = getattr(settings, name)
        if value is None:
            continue
        readers = [source for source in list_sources() if name in get_source(source).options]
        remedy = f"it is for sdar.teacher.source={' or '.join(readers)}" if readers else "it is for placement=pool"
        faults.append(
            f"sdar.teacher.{name}={value} has no effect with sdar.teacher.source={settings.source}; {remedy}, "
            "leave it null otherwise"
        )
    return faults


def _placement(settings: TeacherConfig, placements: tuple[str, ...]) -> list[str]:
    if settings.placement not in placements:
        able = [source for source in list_sources() if settings.placement in get_source(source).placements]
        return [
            f"sdar.teacher.placement={settings.placement} is not possible with sdar.teacher.source={settings.source}, "
            f"{_WHY_NOT[settings.placement]}; possible with source={' or '.join(able)}. Use placement=colocated"
        ]
    if settings.placement == "pool":
        if settings.pool_gpus_per_node is None:
            return ["sdar.teacher.placement=pool needs devices of its own; set sdar.teacher.pool_gpus_per_node"]
        return []
    return [
        f"sdar.teacher.{name}={getattr(settings, name)} has no effect with "
        f"sdar.teacher.placement={settings.placement}; leave it null or set sdar.teacher.placement=pool"
        for name in _POOL_OPTIONS
        if getattr(settings, name) is not None
    ]


def _needed_early(sdar: SdarConfig) -> list[str]:
    try:
        options = needs_step_statistics(sdar.loss)
    except ValueError:
        return []  # an unknown name, told by the loss's own checks
    bad = sdar.context.contrast.sources
    options += [f"sdar.context.contrast.sources={bad}"] if bad else []
    mixed = sdar.context.teachers.weights
    options += [f"sdar.context.teachers.weights={mixed}"] if mixed else []
    return [
        f"{option} needs the teacher's log-probs of the whole step before the update, but "
        f"sdar.teacher.source={sdar.teacher.source} scores inside the update; use sdar.teacher.source=actor"
        for option in options
    ]


def _vocabulary(config: DictConfig, path: str) -> list[str]:
    """Token ids must mean the same to teacher and student: the teacher scores the student's ids."""
    if missing := missing_model("sdar.teacher.path", path):
        return missing
    try:
        teacher, student = _tokenizer(config, path), _tokenizer(config, config.actor_rollout_ref.model.path)
    except (OSError, ValueError) as error:
        return [
            f"sdar.teacher.path={path}: its tokenizer, or that of actor_rollout_ref.model.path="
            f"{config.actor_rollout_ref.model.path}, cannot be read: {error}; give folders of models on this machine, "
            "or names of Hugging Face's hub"
        ]
    if teacher == student:
        return []
    different = sorted(token for token in {*teacher, *student} if teacher.get(token) != student.get(token))
    token = different[0]
    return [
        f"sdar.teacher.path={path} has another tokenizer than actor_rollout_ref.model.path: {len(different)} tokens "
        f"differ, such as {token!r} (id {teacher.get(token)} there, {student.get(token)} here); a teacher scores the "
        "student's token ids, so choose one with the same tokenizer"
    ]


def _tokenizer(config: DictConfig, path: str) -> dict[str, int]:
    from transformers import AutoTokenizer

    trust = config.actor_rollout_ref.model.get("trust_remote_code", False)
    vocabulary: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust).get_vocab()
    return dict(vocabulary)


def _positions(config: DictConfig, settings: TeacherConfig) -> list[str]:
    """A row longer than the model's positions is computed without an error, and wrong."""
    described = Path(str(config.actor_rollout_ref.model.path)) / "config.json"
    try:
        limit = json.loads(described.read_text()).get("max_position_embeddings")
    except (OSError, ValueError):
        return []  # not on this machine, or not a model: verl tells
    override = OmegaConf.select(config, "actor_rollout_ref.model.override_config.max_position_embeddings")
    limit, response = override or limit, config.data.max_response_length
    longest = settings.max_prompt_length + response
    if limit is None or longest <= limit:
        return []
    remedy = (
        f"set sdar.teacher.max_prompt_length to at most {limit - response}"
        if response < limit
        else "lower data.max_response_length, which leaves no room for a prompt"
    )
    return [
        f"sdar.teacher.max_prompt_length={settings.max_prompt_length} and data.max_response_length={response} make "
        f"teacher rows of up to {longest} tokens, and the model {described.parent} has {limit} positions; {remedy}"
    ]


def _budgets(config: DictConfig, settings: TeacherConfig, *, own_engine: bool) -> list[str]:
    longest = settings.max_prompt_length + config.data.max_response_length
    # Limits of a pass over the actor's weights stand with the rollout.
    passes = [("rollout", "actor")]
    if own_engine and not (uses_lora(config) and settings.path is None and settings.placement == "colocated"):
        passes.append(("ref", "ref"))
    faults = []
    for role, engine in passes:
        node = config.actor_rollout_ref[role]
        _, ranks = sequence_parallel(config.actor_rollout_ref[engine])
        limit = node.log_prob_max_token_len_per_gpu
        # verl multiplies the limit by the ranks that share a row.
        if node.log_prob_use_dynamic_bsz and limit is not None and longest > limit * ranks:
            option = f"actor_rollout_ref.{role}.log_prob_max_token_len_per_gpu"
            shared = f" over {ranks} ranks" if ranks > 1 else ""
            faults.append(
                f"{option}={limit} is less than the longest teacher row, sdar.teacher.max_prompt_length + "
                f"data.max_response_length = {longest}{shared}; raise it to at least {-(-longest // ranks)}"
            )
    return faults
