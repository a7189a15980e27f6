"""Checks of one run's config that go beyond what stops it at its start: data, model, devices, lengths, skills."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.checks.modes import verl_mode
from sdar_verl.checks.notes import run_notes
from sdar_verl.checks.options import missing_faults
from sdar_verl.checks.panel_tasks import panel_files, panel_tasks
from sdar_verl.checks.run import check_run
from sdar_verl.compose import compose_config
from sdar_verl.config import SdarConfig, load_config
from sdar_verl.config_folders import ConfigFolders
from sdar_verl.doctor.findings import Finding
from sdar_verl.doctor.machine import Machine
from sdar_verl.doctor.prompts import check_prompts
from sdar_verl.errors import ConfigError
from sdar_verl.panels import missing_files
from sdar_verl.recipe import plays_environments


def check_config(
    config_name: str, overrides: list[str], machine: Machine, resets: int, folders: ConfigFolders | None = None
) -> list[Finding]:
    """Every finding about the run that ``--config-name CONFIG_NAME OVERRIDES`` would start.

    Args:
        config_name: recipe.
        overrides: Hydra overrides.
        machine: where it would start.
        resets: tasks of each panel whose environment is really reset, to see its first prompt.
        folders: of YAML files of the user's own.
    """
    try:
        config = compose_config(config_name, overrides, folders)
        sdar = load_config(config.get("sdar"))
        OmegaConf.resolve(config)
    except ConfigError as error:
        return [Finding("fail", "config", str(error))]
    except Exception as error:  # an interpolation that leads nowhere, a missing value
        return [Finding("fail", "config", f"{type(error).__name__}: {error}")]
    findings = list(_check_run(config, sdar))
    if missing_faults(config):  # the others read all options
        return findings
    for check in (_data, _devices, _steps, _model):
        findings += check(config, sdar, machine)
    findings += check_prompts(config, sdar, resets)
    return findings


def _check_run(config: DictConfig, sdar: SdarConfig) -> Iterator[Finding]:
    """What a run checks of itself at its start."""
    try:
        check_run(config, sdar)
    except ConfigError as error:
        for fault in str(error).splitlines():
            yield Finding("fail", "config", fault)
    else:
        yield Finding("ok", "config", "composes, and passes the checks that a run makes before it starts")
        yield from (Finding("warn", "config", note) for note in run_notes(config, sdar))


# ---------------------------------------------------------------- data


def _data(config: DictConfig, sdar: SdarConfig, machine: Machine) -> Iterator[Finding]:
    ids: dict[str, set[str]] = {}
    for option, name in (("train_files", "training panel"), ("val_files", "validation panel")):
        if not all(Path(file).is_file() for file in panel_files(config, option)):
            continue  # told by the run's own checks
        tasks = panel_tasks(config, option)
        if not tasks:
            continue
        ids[option] = {task.task_id for task in tasks}
        types = Counter(task.task_type for task in tasks)
        if missing_files(tasks):
            continue  # so is this
        few = [f"{kind} ({number})" for kind, number in sorted(types.items()) if number < 10]
        if option == "val_files" and few:
            text = f"{len(tasks)} tasks; few of the types {', '.join(few)}: their success rates will say little"
            yield Finding("warn", name, text, "validate on a larger panel")
        else:
            yield Finding("ok", name, f"{len(tasks)} tasks of {len(types)} types")
    if len(ids) == 2 and (shared := ids["train_files"] & ids["val_files"]):
        yield Finding(
            "warn",
            "panels",
            f"{len(shared)} of {len(ids['val_files'])} validation tasks are training tasks too, e.g. {min(shared)}",
            "set data.val_files to a panel of other tasks, or read its success as training success",
        )


# ---------------------------------------------------------------- devices


def _devices(config: DictConfig, sdar: SdarConfig, machine: Machine) -> Iterator[Finding]:
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    own, nodes = trainer.n_gpus_per_node, trainer.nnodes
    extra = sdar.teacher.pool_gpus_per_node if sdar.teacher.placement == "pool" else None
    pool = (extra or 0) * (sdar.teacher.pool_nodes or 1)
    world, separate = own * nodes, verl_mode(trainer.v1.trainer_mode) == "separate_async"
    apart = rollout.nnodes * rollout.n_gpus_per_node if separate else 0
    others = (f", {apart} for a rollout of its own" if apart else "") + (f", {pool} for the teacher" if pool else "")
    text = f"{world} for training and rollout{others}"
    tensor_parallel = rollout.tensor_model_parallel_size
    for count, place in ((world, "trainer"), (apart, "actor_rollout_ref.rollout")):
        if count % tensor_parallel:
            yield Finding(
                "fail",
                "resource pools",
                f"actor_rollout_ref.rollout.tensor_model_parallel_size={tensor_parallel} does not divide the {count} "
                f"devices of {place}.n_gpus_per_node x {place}.nnodes",
                "choose a divisor",
            )
            return
    if trainer.device == "cpu":
        yield Finding("ok", "resource pools", f"{world} workers on the CPU{others}")
        return
    pool += apart
    elsewhere = "RAY_ADDRESS" in os.environ or nodes > 1
    if machine.gpus == 0 and not elsewhere:
        yield Finding(
            "fail",
            "resource pools",
            f"the run asks for {world + pool} GPUs ({text}), this machine has none",
            "start it on a machine with GPUs, or use hardware=cpu",
        )
    elif not elsewhere and machine.gpus < world + pool:
        yield Finding(
            "fail",
            "resource pools",
            f"the run asks for {world + pool} GPUs ({text}), this machine has {machine.gpus}",
            f"set trainer.n_gpus_per_node to at most {machine.gpus - pool}"
            if machine.gpus > pool
            else f"start it on a machine with {world + pool} GPUs",
        )
    elif elsewhere and machine.gpus < own:
        yield Finding(
            "warn",
            "resource pools",
            f"the run asks for {world + pool} GPUs ({text}) of a cluster not looked at; {machine.gpus} are here",
            "compare with `ray status` there",
        )
    else:
        yield Finding("ok", "resource pools", f"{text}, of {machine.gpus} here")


# ---------------------------------------------------------------- rows of a step


def _steps(config: DictConfig, sdar: SdarConfig, machine: Machine) -> Iterator[Finding]:
    episodes = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    per_turn = plays_environments(config) and sdar.rollout.rows == "per_turn"
    most = episodes * (sdar.env.max_steps if per_turn else 1)
    rows = sdar.update.mini_batch_rows
    prompts = config.actor_rollout_ref.actor.ppo_mini_batch_size
    size = rows if rows is not None else prompts * config.actor_rollout_ref.rollout.n
    updates = f"{-(-episodes // size)} to {-(-most // size)} updates of {size} rows"
    if size > most:
        option = "sdar.update.mini_batch_rows" if rows is not None else "actor_rollout_ref.actor.ppo_mini_batch_size"
        yield Finding(
            "warn",
            "rows of a step",
            f"an update of {size} rows ({option}) is larger than a step can be ({most} rows): the rest is padding",
            f"lower {option}, or raise data.train_batch_size",
        )
    else:
        yield Finding("ok", "rows of a step", f"{episodes} episodes, {episodes} to {most} rows, {updates}")
    steps = config.trainer.total_training_steps
    if steps and config.trainer.save_freq <= 0 and config.trainer.device != "cpu":
        yield Finding(
            "warn", "checkpoints", "trainer.save_freq is off: nothing is left of the run", "set trainer.save_freq"
        )


# ---------------------------------------------------------------- model


def _model(config: DictConfig, sdar: SdarConfig, machine: Machine) -> Iterator[Finding]:
    path = str(config.actor_rollout_ref.model.path)
    described = _read_quietly(lambda: _model_config(path, config))
    if isinstance(described, Exception):
        if Path(path).exists() or path.startswith(("/", ".", "~")):
            text = f"actor_rollout_ref.model.path={path} holds no model that transformers can read: {described}"
            yield Finding("fail", "model", text.splitlines()[0], "point it to a folder with config.json")
        else:
            yield Finding("warn", "model", f"{path} is not on this machine, so its limits are not checked",
                          "download it first, and name its folder: actor_rollout_ref.model.path=...")  # fmt: skip
        return
    limit = getattr(described.get_text_config(), "max_position_embeddings", None)
    response = config.data.max_response_length
    needs = {"data.max_prompt_length": config.data.max_prompt_length + response}
    if sdar.teacher.source != "none":
        needs["sdar.teacher.max_prompt_length"] = sdar.teacher.max_prompt_length + response
    too_long = {option: need for option, need in needs.items() if limit is not None and need > limit}
    for option, need in too_long.items():
        yield Finding(
            "fail",
            "model",
            f"{option} + data.max_response_length = {need} tokens, the model has {limit} positions",
            f"lower {option}",
        )
    engine = config.actor_rollout_ref.rollout.get("max_model_len")
    if engine is not None and needs["data.max_prompt_length"] > engine:
        yield Finding(
            "fail",
            "rollout engine",
            f"actor_rollout_ref.rollout.max_model_len={engine} is less than data.max_prompt_length + "
            f"data.max_response_length = {needs['data.max_prompt_length']}",
            "raise it, or set it to null",
        )
    if not too_long:
        yield Finding("ok", "model", f"{path}: {limit or 'unknown'} positions, {max(needs.values())} needed")


def _model_config(path: str, config: DictConfig) -> Any:
    from transformers import AutoConfig

    trust = config.actor_rollout_ref.model.get("trust_remote_code", False)
    return AutoConfig.from_pretrained(path, trust_remote_code=trust, local_files_only=True)


def _read_quietly(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # transformers raises many kinds
        return error
