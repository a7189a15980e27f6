"""Checks of objectives over distributions: options without effect, supports that do not fit, engines that cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from sdar_verl.algorithm.divergences import DIVERGENCES, SUPPORT_OF
from sdar_verl.algorithm.schedules import GRAD_SHARE, make_schedule, measures_of
from sdar_verl.algorithm.signals import signal_reads
from sdar_verl.checks.engine import sequence_parallel
from sdar_verl.config import SdarConfig
from sdar_verl.config.loss import LossConfig, ScheduleConfig
from sdar_verl.errors import ConfigError
from sdar_verl.planner.families import find_architecture
from sdar_verl.requests import anchored, distribution_option, reads_distributions, top_k
from sdar_verl.teacher.sources import get_source, has_reference, list_sources, uses_lora

_OPTIONS = ("support", "top_k", "tail", "chunk_tokens")


def distribution_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every fault, one line each; ``config`` is verl's whole config. Names were checked before."""
    loss = sdar.loss
    if sdar.teacher.source == "none":
        return []
    if reads_distributions(loss):
        return [*_support(config, sdar), *_sizes(config, sdar), *_engine(config, sdar), *_anchor(config, sdar)]
    if loss.coef == 0:
        return []  # the signal is off: a baseline of some recipe, whose other options may stay as they are
    return [
        f"sdar.loss.{name}={getattr(loss, name)} has no effect with sdar.loss.objective={loss.objective}; "
        "leave it at null, or use objective forward_kl, reverse_kl or jsd"
        for name in _OPTIONS
        if getattr(loss, name) is not None
    ] + [*_anchor(config, sdar)]


def _support(config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    loss = sdar.loss
    if loss.support == "top_k" and loss.objective not in DIVERGENCES:
        yield (
            f"sdar.loss.support=top_k: sdar.loss.objective={loss.objective} asks an anchored target (sdar.loss.anchor) "
            "for the sampled token, which may lie outside of the k; leave it at null"
        )
        return
    if loss.support != "top_k":
        for name in ("top_k", "tail"):
            if getattr(loss, name) is not None:
                yield (
                    f"sdar.loss.{name}={getattr(loss, name)} has no effect over the whole vocabulary; "
                    "set sdar.loss.support=top_k, or leave it at null"
                )
        if sdar.teacher.placement == "pool":
            yield (
                "sdar.loss.support=full needs the teacher's head next to the actor, but with "
                f"sdar.teacher.placement=pool it is on other devices; {_not_over_all(loss)}set "
                "sdar.teacher.placement=colocated"
            )
        return
    vocabulary = model_vocabulary(config)
    if vocabulary is not None and top_k(loss) > vocabulary:
        yield (
            f"sdar.loss.top_k={top_k(loss)} is more than the model's vocabulary of {vocabulary} tokens; "
            "lower it or set sdar.loss.support=full"
        )
    if loss.tail == "renormalise" and top_k(loss) == 1:
        yield (
            "sdar.loss.tail=renormalise scales a single token (sdar.loss.top_k=1) to probability 1 on both sides: "
            "nothing would be learned; set sdar.loss.tail=bucket or a larger top_k"
        )


def _not_over_all(loss: LossConfig) -> str:
    """The remedy that objectives over distributions have, and an anchored target of the sampled token has not."""
    return "set sdar.loss.support=top_k, or " if loss.objective in DIVERGENCES else ""


def _anchor(config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    """The start policy's pass goes through verl's reference worker; the student's weight may follow a schedule."""
    loss, source = sdar.loss, sdar.teacher.source
    weight, schedule = loss.anchor.reference, loss.anchor.student_schedule
    if anchored(loss) and loss.objective == "sampled":
        yield (
            "sdar.loss.anchor has no effect with sdar.loss.objective=sampled, whose gradient is the same for every "
            "target; leave its weights at 0, or use objective k1, k2, k3, forward_kl, reverse_kl or jsd"
        )
    elif anchored(loss) and not signal_reads(loss.signal, "loss", loss.signal_options):
        yield f"sdar.loss.anchor has no effect with sdar.loss.signal={loss.signal}; leave its weights at 0"
    if not loss.anchor.student and schedule != ScheduleConfig():
        yield (
            f"sdar.loss.anchor.student_schedule.name={schedule.name} has no effect with sdar.loss.anchor.student=0; "
            "set that above 0"
        )
    if not weight:
        return
    option = f"sdar.loss.anchor.reference={weight}"
    if uses_lora(config) or not has_reference(config):
        why = "trains an adapter, whose base is no worker of its own" if uses_lora(config) else "does not start"
        remedy = "use anchor.student" if uses_lora(config) else "set actor_rollout_ref.actor.use_kl_loss=True, "
        remedy += "" if uses_lora(config) else "whose kl_loss_coef may be 0"
        yield f"{option} asks verl's reference worker, which this run {why}; {remedy}"
    if source in list_sources() and get_source(source).per_update:
        yield (
            f"{option} is a pass before the update, but sdar.teacher.source={source} scores inside it; use "
            "sdar.teacher.source=actor, or anchor.student"
        )


def _sizes(config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    """Models with one tokenizer may have heads of different sizes (Qwen2.5's up to 3B and from 7B on)."""
    loss, path = sdar.loss, sdar.teacher.path
    student, teacher = model_vocabulary(config), None if path is None else _vocabulary(path)
    if student is None or teacher is None or student == teacher:
        return
    sizes = f"sdar.teacher.path={path} has a head of {teacher} tokens, the model that is trained one of {student}"
    if loss.support != "top_k":
        yield (
            f"{sizes}, and sdar.loss.support=full compares them token by token; {_not_over_all(loss)}use "
            "sdar.loss.objective=sampled without an anchor"
        )
    elif SUPPORT_OF.get(loss.objective) == "student" and teacher < student:
        yield (
            f"{sizes}, whose most likely tokens (sdar.loss.objective={loss.objective}) the teacher must have; use "
            "sdar.loss.objective=forward_kl or sampled"
        )


def _engine(config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    node, objective = config.actor_rollout_ref, distribution_option(sdar.loss)
    if node.model.get("use_fused_kernels", False):
        yield (
            f"{objective} reads the input of the language-model head, which fused kernels do not call; "
            "set actor_rollout_ref.model.use_fused_kernels=False"
        )
    for name in ("actor", "ref"):
        option, size = sequence_parallel(node[name])
        if size > 1:
            yield (
                f"{objective} is not available with sequence parallelism (actor_rollout_ref.{name}.{option}={size}); "
                "set it to 1, or use sdar.loss.objective=sampled without an anchor"
            )
        engine = node[name].get("fsdp_config", None) or {}
        if engine.get("pad_to_length", False):
            yield (
                f"{objective} is not available with static padding; set "
                f"actor_rollout_ref.{name}.fsdp_config.pad_to_length=False"
            )
    if sdar.loss.objective in DIVERGENCES and GRAD_SHARE in _measured(sdar.loss):
        yield (
            f"sdar.loss.coef_schedule.name={sdar.loss.coef_schedule.name} follows {GRAD_SHARE}, a gradient on sampled "
            f"tokens, which {objective} does not have; use its option of=weights, or another schedule"
        )


def _measured(loss: LossConfig) -> tuple[str, ...]:
    return measures_of(make_schedule(loss.coef_schedule.name, loss.coef_schedule.options))


def model_vocabulary(config: DictConfig) -> int | None:
    """Rows of the model's head; None when the model is neither on this machine nor one of the recipes'."""
    model = config.actor_rollout_ref.model
    return _vocabulary(str(model.get("hf_config_path", None) or model.path))


def _vocabulary(path: str) -> int | None:
    file = Path(path) / "config.json"
    if not file.is_file():
        try:
            return find_architecture(path).vocabulary
        except ConfigError:
            return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    return settings.get("vocab_size") or settings.get("text_config", {}).get("vocab_size")
