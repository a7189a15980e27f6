"""Whether the mirror can take this run's checkpoints; known before Ray starts."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import DictConfig

from sdar_verl.config import CloudConfig, SdarConfig


def cloud_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Why this run cannot be mirrored as it is told to, one text each; empty without a mirror."""
    place = sdar.cloud.mirror
    if place is None:
        if sdar.cloud.keep == CloudConfig().keep:
            return []
        return [f"sdar.cloud.keep={sdar.cloud.keep} has no effect without a mirror; set sdar.cloud.mirror too"]
    from sdar_verl.cloud.mirror import Mirror
    from sdar_verl.cloud.store import StoreError
    from sdar_verl.panels import PanelError
    from sdar_verl.verl.resume import RUN_FILE, differences, experiment, named

    option, trainer = f"sdar.cloud.mirror={place}", config.trainer
    faults = []
    if trainer.save_freq <= 0:
        faults.append(f"{option} has no effect with trainer.save_freq={trainer.save_freq}; save every few steps")
    if trainer.get("max_actor_ckpt_to_keep") == 1:
        faults.append(
            f"{option} with trainer.max_actor_ckpt_to_keep=1: verl would delete a checkpoint that is on its way; keep 2"
        )
    folder = Path(str(trainer.default_local_dir)).expanduser().absolute()
    try:
        mirror = Mirror(place)
        inside = mirror.store.folder is not None and mirror.store.folder.is_relative_to(folder.resolve())
        if "://" not in place or inside:
            faults.append(
                f"{option} must be s3://, gs://, az:// or file:///, and outside of trainer.default_local_dir={folder}"
            )
        if faults:
            return faults
        mirror.store.check()
        found, newest = mirror.store.read_json(RUN_FILE), mirror.newest()
        changes = differences(found, experiment(config), config) if found is not None else []
    except PanelError:
        return []  # named by the check of the data
    except StoreError as error:
        return [f"sdar.cloud.mirror: {error}"]
    if changes:
        return [
            f"{option} holds another experiment ({named(changes)}); give this run a mirror of its own, such as "
            f"{place}-2"
        ]
    first = {"auto": newest, "resume_path": _step(trainer.get("resume_from_path"))}.get(trainer.resume_mode, 0)
    if newest > first:
        return [
            f"{option} holds global_step_{newest}, and trainer.resume_mode={trainer.resume_mode} would begin at step "
            f"{first} beside it; give this run a mirror of its own, or empty that one"
        ]
    return []


def _step(checkpoint: str | None) -> int:
    found = re.search(r"global_step_(\d+)$", str(checkpoint))
    return int(found[1]) if found else 0
