"""Guards verl's ``resume_mode=auto``: a run must not go on from the checkpoint of another experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.atomic import write_text_atomically
from sdar_verl.errors import ConfigError
from sdar_verl.training.checks.resume import TRACKER
from sdar_verl.training.panel_tasks import panel_digests
from sdar_verl.untrusted import parse_json, shorten

RUN_FILE = "sdar_run.json"
_PANEL = "data.train_files (hashes)"

# What makes two runs different experiments; lengths, frequencies, process counts and validation do not.
_OPTIONS = (
    "sdar.loss",
    "sdar.teacher",
    "sdar.context",
    "sdar.skills",
    "sdar.prompt",
    "sdar.advantage",
    "sdar.update",
    "sdar.env.name",
    "sdar.env.options",
    "sdar.env.max_steps",
    "sdar.env.invalid_action",
    "sdar.rollout.rows",
    "sdar.rollout.turn_length",
    "sdar.rollout.seed",
    "algorithm.adv_estimator",
    "algorithm.norm_adv_by_std_in_grpo",
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.actor.optim.lr",
    "actor_rollout_ref.actor.use_kl_loss",
    "actor_rollout_ref.actor.kl_loss_coef",
    "actor_rollout_ref.actor.entropy_coeff",
    "actor_rollout_ref.actor.loss_agg_mode",
    "actor_rollout_ref.actor.clip_ratio_low",
    "actor_rollout_ref.actor.clip_ratio_high",
    "actor_rollout_ref.actor.clip_ratio_c",
    "data.train_batch_size",
    "data.seed",
)

# Of those nodes: where the teacher runs, and how closely it is watched.
_NOT_THE_EXPERIMENT = {
    "sdar.teacher.offload",
    "sdar.teacher.placement",
    "sdar.teacher.pool_gpus_per_node",
    "sdar.teacher.pool_nodes",
    "sdar.teacher.sanity_check",
    "sdar.teacher.sanity_tolerance",
}


def fingerprint(config: DictConfig) -> dict[str, Any]:
    """Option -> value of everything that makes this experiment what it is."""
    values: dict[str, Any] = {}
    for option in _OPTIONS:
        value = OmegaConf.select(config, option)
        if OmegaConf.is_config(value):
            nested = OmegaConf.to_container(value, resolve=True)
            assert isinstance(nested, dict)
            values |= {f"{option}.{key!s}": item for key, item in nested.items()}
        else:
            values[option] = value
    return {option: value for option, value in values.items() if option not in _NOT_THE_EXPERIMENT}


def experiment(config: DictConfig) -> dict[str, Any]:
    """The note of an experiment: its fingerprint, and the training panel's hashes.

    Raises:
        PanelError: a training panel is missing or not one of ours.
    """
    # Where the panel lies may change, but data.pt holds a place in it.
    return {**fingerprint(config), _PANEL: panel_digests(config, "train_files")}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """How the noted experiment ``found`` differs from ``wanted``; empty when it is the same."""
    read = {*found, *wanted} - _NOT_THE_EXPERIMENT
    different = sorted(key for key in read if found.get(key) != wanted.get(key))
    return "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} here" for key in different)


def claim_checkpoints(config: DictConfig) -> None:
    """Note this experiment in its checkpoint folder, or refuse the folder of another one.

    Raises:
        PanelError: a training panel is missing or not one of ours.
        ConfigError: ``trainer.resume_mode=auto`` would resume an experiment with other settings, which it names; or the
            note is damaged.
    """
    folder = Path(str(config.trainer.default_local_dir)).expanduser()
    note = folder / RUN_FILE
    wanted = experiment(config)
    resumable = (folder / TRACKER).is_file()
    if config.trainer.resume_mode == "auto" and resumable and note.is_file():
        try:
            found = parse_json(note.read_bytes())
            if not isinstance(found, dict):
                raise ValueError(f"it holds {shorten(found)}, not an object")
        except ValueError as error:
            raise ConfigError(
                f"{note} is damaged ({error}), so nobody can tell whether its checkpoints are of this experiment; "
                "remove it when they are, or start over with trainer.resume_mode=disable"
            ) from error
        changes = differences(found, wanted)
        if changes:
            raise ConfigError(
                f"trainer.default_local_dir={folder} holds checkpoints of another experiment ({changes}). Give this "
                "run its own folder (trainer.experiment_name=... or trainer.default_local_dir=...), or start over with "
                "trainer.resume_mode=disable"
            )
    write_text_atomically(note, json.dumps(wanted, indent=1) + "\n")


def resumed_folder(config: DictConfig, step: int) -> Path:
    """The checkpoint folder that verl has just resumed from."""
    if config.trainer.resume_mode == "resume_path":
        return Path(str(config.trainer.resume_from_path))
    return Path(str(config.trainer.default_local_dir)) / f"global_step_{step}"


def from_scratch(config: DictConfig) -> str:
    """A line for a run that should have resumed and found nothing but checkpoints that were never finished."""
    folder = Path(str(config.trainer.default_local_dir)).expanduser()
    left = sorted(path.name for path in folder.glob("global_step_*"))
    if config.trainer.resume_mode != "auto" or not left:
        return ""
    return (
        f"sdar: {folder} holds {', '.join(left)}, but no {TRACKER}: none was finished, training starts from scratch\n"
    )
