"""Checks of the trainer's mode before Ray starts: ``sdar``, ``sdar_colocate_async``, ``sdar_separate_async``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.config import SdarConfig
from sdar_verl.teacher.sources import uses_lora

MODES = {"sdar": "sync", "sdar_colocate_async": "colocate_async", "sdar_separate_async": "separate_async"}
"""Mode of ours -> mode of verl's that it stands on."""
_BACKENDS = ("naive", "nccl", "nixl", "kimi_ckpt_engine", "mooncake", "delta_sharded")
"""verl's checkpoint engines; its registry holds those alone whose packages are in this process."""
_OURS = "sdar_verl.local.weights"


def mode_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every option that the run's mode does not have, or that it misses, one message each."""
    mode = config.trainer.v1.trainer_mode
    for ours, verls in MODES.items():
        if mode == verls:
            return [f"trainer.v1.trainer_mode={mode} ignores the sdar node; set trainer.v1.trainer_mode={ours}"]
    if mode not in MODES and not _registered(mode):
        return [
            f"trainer.v1.trainer_mode={mode}: no trainer of that name is registered; use one of {', '.join(MODES)}, or "
            "name the module that registers yours in sdar.modules"
        ]
    faults = [*_correction(config), *_backend(config)]
    base = verl_mode(mode)
    if base in ("colocate_async", "separate_async"):
        faults += _asynchronous(config, mode)
    if base == "separate_async":
        faults += _separate(config, sdar, mode)
    return faults


def _registered(mode: str) -> bool:
    """Whether somebody else registered ``mode``: verl is asked, which takes seconds the first time."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    return mode in TRAINER_REGISTRY


def verl_mode(mode: str) -> str | None:
    """The mode of verl's that ``mode`` stands on; None where that is not known yet (a subclass of somebody else's)."""
    registry = getattr(sys.modules.get("verl.trainer.ppo.v1.trainer_base"), "TRAINER_REGISTRY", {})
    return MODES.get(mode) or getattr(registry.get(mode), "verl_mode", None)


def parts_of_a_step(config: DictConfig) -> int:
    """Local updates between two weight syncs, each with rows of its own."""
    separate = verl_mode(config.trainer.v1.trainer_mode) == "separate_async"
    return int(config.trainer.v1.separate_async.parameter_sync_step) if separate else 1


def _correction(config: DictConfig) -> list[str]:
    correction = config.algorithm.get("rollout_correction", None) or {}
    asked = [name for name in ("rollout_is", "rollout_rs", "bypass_mode") if correction.get(name, None)]
    if not asked:
        return []
    if config.actor_rollout_ref.rollout.calculate_log_probs:
        return _correcting(correction)
    named = ", ".join(f"algorithm.rollout_correction.{name}={correction[name]}" for name in asked)
    return [
        f"{named} has no effect with actor_rollout_ref.rollout.calculate_log_probs=False, which leaves the rollout's "
        "log-probs out; set it to True"
    ]


def _correcting(correction: Mapping[str, Any]) -> list[str]:
    """Words and thresholds, tried on one token: verl reads them in the first step, when the rollout is done."""
    from torch import ones, zeros
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    names = ("rollout_is", "rollout_is_threshold", "rollout_rs", "rollout_rs_threshold")
    given = {name: correction[name] for name in names if correction.get(name, None) is not None}
    try:
        compute_rollout_correction_and_rejection_mask(zeros(1, 1), zeros(1, 1), ones(1, 1), **given)
    except (ValueError, TypeError) as error:
        named = ", ".join(f"algorithm.rollout_correction.{name}={value}" for name, value in given.items())
        return [f"{named}: verl cannot correct with that: {error}"]
    return []


def _backend(config: DictConfig) -> list[str]:
    """The name of the engine that sends weights to the rollout; verl makes it in every mode."""
    engine, option = config.actor_rollout_ref.rollout.checkpoint_engine, "actor_rollout_ref.rollout.checkpoint_engine"
    module = engine.get("custom_backend_module", None)
    known = {None: _BACKENDS, _OURS: (*_BACKENDS, "gloo")}.get(module)
    if known is None or engine.backend in known:
        return []  # the module of somebody else may register any name
    return [
        f"{option}.backend={engine.backend}: verl knows {', '.join(known)}; use one of them, or name the module that "
        f"registers yours in {option}.custom_backend_module"
    ]


def _asynchronous(config: DictConfig, mode: str) -> list[str]:
    faults = []
    fetched = config.data.get("gen_batch_size", None)
    if fetched not in (None, 1):
        faults.append(
            f"data.gen_batch_size={fetched} is not possible with trainer.v1.trainer_mode={mode}, which replaces "
            "prompts one by one; leave it null"
        )
    if config.trainer.v1.sampler.get("sync_refill_failed_groups", False):
        faults.append(
            f"trainer.v1.sampler.sync_refill_failed_groups=True has no effect with trainer.v1.trainer_mode={mode}, "
            "which always replaces a failed group; leave it False"
        )
    return faults


def _separate(config: DictConfig, sdar: SdarConfig, mode: str) -> list[str]:
    rollout, named = config.actor_rollout_ref.rollout, f"trainer.v1.trainer_mode={mode}"
    parts, mini = parts_of_a_step(config), config.actor_rollout_ref.actor.ppo_mini_batch_size
    faults = []
    if config.data.train_batch_size != parts * mini:
        faults.append(
            f"data.train_batch_size={config.data.train_batch_size} must be the tasks of all local updates between two "
            f"weight syncs with {named}: trainer.v1.separate_async.parameter_sync_step={parts} times "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini}, which is {parts * mini}"
        )
    faults += [
        f"actor_rollout_ref.rollout.{name}={rollout[name]}: {named} wants devices for the rollout alone; set it to at "
        "least 1"
        for name in ("nnodes", "n_gpus_per_node")
        if not rollout[name]
    ]
    if rollout.checkpoint_engine.backend == "naive":
        faults.append(
            f"actor_rollout_ref.rollout.checkpoint_engine.backend=naive cannot reach the rollout of {named}, which has "
            "devices of its own; set it to nccl (needs cupy), another engine of verl's, or gloo on a CPU"
        )
    if uses_lora(config) and not OmegaConf.select(config, "actor_rollout_ref.model.lora.merge"):
        faults.append(
            f"actor_rollout_ref.model.lora_rank={config.actor_rollout_ref.model.lora_rank}: {named} would send its "
            "rollout the frozen base without the adapter (verl's issue 7495), which never learns; set "
            "actor_rollout_ref.model.lora.merge=True"
        )
    if not uses_lora(config) and not config.actor_rollout_ref.hybrid_engine:
        own = (
            "uses verl's reference in the actor's worker, and with actor_rollout_ref.hybrid_engine=False "
            f"{named} gives it a worker of its own"
        )
        teacher = sdar.teacher
        if teacher.source == "reference" and teacher.placement == "colocated" and teacher.path is None:
            faults.append(
                f"sdar.teacher.source=reference {own}; set sdar.teacher.path to the model training starts from, or "
                "sdar.teacher.placement=pool, or leave hybrid_engine=True"
            )
        if sdar.loss.anchor.reference > 0 and teacher.source != "none":
            faults.append(
                f"sdar.loss.anchor.reference={sdar.loss.anchor.reference:g} {own}; leave hybrid_engine=True, or "
                "sdar.loss.anchor.reference at 0"
            )
    return faults
