"""What is no fault and yet worth a line before a run starts."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sdar_verl.checks.options import idle_options
from sdar_verl.checks.panel_tasks import panel_files
from sdar_verl.config import SdarConfig

NO_LIMIT = 1000
"""``trainer.total_epochs`` of the recipes, whose length is ``total_training_steps``."""


def run_notes(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """One text each; :func:`~sdar_verl.checks.run.check_run` has passed."""
    trainer, rollout, notes = config.trainer, config.actor_rollout_ref.rollout, idle_options(config)
    whole = {"top_p": 1, "top_k": -1}
    cut = {name: rollout[name] for name, value in whole.items() if rollout.get(name, value) != value}
    if cut:
        named = ", ".join(f"actor_rollout_ref.rollout.{name}={value}" for name, value in cut.items())
        notes.append(
            f"{named}: tokens are sampled from a part of the distribution, while student, teacher and reference are "
            "scored over all of it. The gap is that of whole distributions on tokens of the cut one, and the rollout's "
            "own log-probs (training/rollout_probs_diff, algorithm.rollout_correction) differ from the actor's by the "
            "mass that was cut off; the paper samples with top_p=1, top_k=-1"
        )
    epochs, steps = trainer.get("total_epochs", NO_LIMIT), trainer.get("total_training_steps", None)
    known = bool(panel_files(config, "train_files"))  # how many rows remote files hold is not
    if steps is not None and epochs < NO_LIMIT and known:
        notes.append(
            f"trainer.total_epochs={epochs} has no effect: trainer.total_training_steps={steps} ends the run before"
        )
    shown = any(arm.context == "teacher" for arm in sdar.validation.arms.values())
    if sdar.teacher.source == "none" and sdar.context.sources != ["skills"] and not shown:
        notes.append(
            f"sdar.context.sources={sdar.context.sources} has no effect: there is no teacher "
            "(sdar.teacher.source=none), and no validation arm with context=teacher"
        )
    warmup = OmegaConf.select(config, "actor_rollout_ref.actor.optim.lr_warmup_steps") or 0
    if steps is not None and warmup >= steps:
        notes.append(
            f"actor_rollout_ref.actor.optim.lr_warmup_steps={warmup}: the learning rate rises over all of "
            f"trainer.total_training_steps={steps}, and never gets to actor_rollout_ref.actor.optim.lr"
        )
    saved = OmegaConf.select(config, "actor_rollout_ref.actor.checkpoint.save_contents")
    lacking = [part for part in ("model", "optimizer", "extra") if saved is not None and part not in saved]
    if lacking and trainer.save_freq > 0:
        notes.append(
            f"actor_rollout_ref.actor.checkpoint.save_contents={list(saved)} leaves out "
            f"{', '.join(lacking)}: no run can go on from these checkpoints as if never stopped"
        )
    if trainer.get("max_actor_ckpt_to_keep", None) == 1:
        notes.append(
            "trainer.max_actor_ckpt_to_keep=1: verl deletes a checkpoint a moment before the next is whole, and a "
            "crash in that moment leaves none; keep 2"
        )
    elsewhere = "RAY_ADDRESS" in os.environ or trainer.nnodes > 1
    if elsewhere and not Path(str(trainer.default_local_dir)).is_absolute():
        notes.append(
            f"trainer.default_local_dir={trainer.default_local_dir} is read from the working directory of each process "
            "of the cluster; give an absolute path, which all nodes see, to find its checkpoints again"
        )
    return notes
