"""Whether the checkpoint that a run would resume from is whole; known before Ray starts.

verl writes a checkpoint file by file and names it in ``latest_checkpointed_iteration.txt`` when all are there: after a
crash that file names the checkpoint before. The file itself, or what it names, may still be broken: the crash came
while it was written, a disk was full, somebody tidied up. verl then starts from scratch, or shuffles the panel anew,
and says so in a line of its log; here it is an error.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sdar_verl.config import SdarConfig
from sdar_verl.observe.base import STATE_FILE
from sdar_verl.teacher.sources import get_source, list_sources

TRACKER = "latest_checkpointed_iteration.txt"
"""verl's, in ``trainer.default_local_dir``: the step of the newest checkpoint that is whole."""

# verl's names for what it loads (actor.checkpoint.load_contents) and the files it is in, one per rank.
_SHARDS = {"model": "model", "optimizer": "optim", "extra": "extra_state"}
_TEACHER = "sdar_teacher"
_NAMED = 4


def checkpoint_folder(config: DictConfig) -> Path:
    """``trainer.default_local_dir`` as verl takes it: ``~`` is not expanded, a relative path is the process's."""
    return Path(str(config.trainer.default_local_dir))


def resume_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Why this run cannot resume as it is told to, one text each; empty when it starts from scratch."""
    mode, going_on = config.trainer.resume_mode, False
    if faults := folder_faults(config):
        return faults
    if mode == "resume_path":
        faults, going_on = _path_faults(config, sdar), True
    elif mode == "auto":
        faults, going_on = _tracker_faults(config, sdar), (checkpoint_folder(config) / TRACKER).is_file()
    else:
        faults = []
    contents = _contents(config)
    if going_on and "model" not in contents:
        faults.append(
            f"actor_rollout_ref.actor.checkpoint.load_contents={contents} has no model: the run would go on at the "
            "checkpoint's step with the weights that training started from; add model"
        )
    return faults


def folder_faults(config: DictConfig) -> list[str]:
    """Why no checkpoint could be written, or read, by this user; nobody knows here what the nodes of a cluster see."""
    if "RAY_ADDRESS" in os.environ or config.trainer.get("nnodes", 1) != 1:
        return []
    folder = checkpoint_folder(config)
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(place):
        reason = "is no folder"
    elif not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        reason = "cannot be read and written by this user"
    else:
        return []
    return [f"trainer.default_local_dir={folder}: {place} {reason}; name a folder that checkpoints can be written to"]


def missing_parts(folder: Path, config: DictConfig, sdar: SdarConfig) -> list[str]:
    """What a checkpoint folder lacks that this run reads, a few words each.

    Args:
        folder: ``global_step_N``.
        config: verl's whole config.
        sdar: the ``sdar`` node.
    """
    found = []
    if config.actor_rollout_ref.actor.strategy in ("fsdp", "fsdp2"):
        contents = _contents(config)
        names = [shard for content, shard in _SHARDS.items() if content in contents]
        source = sdar.teacher.source
        if source in list_sources() and get_source(source).own_weights:
            names.append(_TEACHER)
        for name in names:
            found += _shards(folder / "actor", name, config)
    data = folder / "data.pt"
    if not data.is_file():
        found.append("data.pt (where in the panel the run was) is missing")
    elif not zipfile.is_zipfile(data):
        found.append("data.pt is cut off")
    state = folder / STATE_FILE
    if state.is_file():
        try:
            json.loads(state.read_text())
        except ValueError:
            found.append(f"{STATE_FILE} is cut off")
    return found


def _contents(config: DictConfig) -> list[str]:
    contents = OmegaConf.select(config, "actor_rollout_ref.actor.checkpoint.load_contents")
    return list(_SHARDS if contents is None else contents)  # verl reads nothing where the list is empty


def _shards(folder: Path, name: str, config: DictConfig) -> list[str]:
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    there = {path.name: path for path in folder.glob(f"{name}_world_size_*_rank_*.pt")}
    wanted = [f"{name}_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
    cut = [file for file in wanted if file in there and not zipfile.is_zipfile(there[file])]
    if cut:
        return [f"{_list(cut)} in actor/ cut off"]
    missing = [file for file in wanted if file not in there]
    others = sorted({int(file.split("_world_size_")[1].split("_")[0]) for file in there} - {ranks})
    if others and len(missing) == ranks:
        return [
            f"actor/{name}_* is of {' or '.join(map(str, others))} ranks, and this run has {ranks} "
            "(trainer.n_gpus_per_node * trainer.nnodes)"
        ]
    # With several nodes, the shards of the others may lie on their own disks.
    if missing and (config.trainer.nnodes == 1 or len(missing) == ranks):
        return [f"{_list(missing)} in actor/ missing"]
    return []


def _tracker_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    folder = checkpoint_folder(config)
    tracker = folder / TRACKER
    if not tracker.is_file():
        return []
    try:
        text = tracker.read_text(errors="replace").strip()
    except OSError as error:
        return [f"{tracker} cannot be read ({error}); make it readable for this user"]
    if not text.isdecimal():
        fault = f"{tracker} should hold the step of the newest checkpoint, but holds {text[:20]!r}"
    else:
        latest = folder / f"global_step_{int(text)}"
        lacks = missing_parts(latest, config, sdar) if latest.is_dir() else ["the folder does not exist"]
        if not lacks:
            return []
        fault = f"{tracker} names {latest.name}, from which this run cannot go on: {'; '.join(lacks)}"
    whole = [step for step, path in _checkpoints(folder) if not missing_parts(path, config, sdar)]
    if whole:
        remedy = (
            f"{folder}/global_step_{whole[-1]} is whole: go on from it with `echo {whole[-1]} > {tracker}`, or start "
            "over with trainer.resume_mode=disable"
        )
    else:
        remedy = f"no other checkpoint in {folder} is whole for this run: start over with trainer.resume_mode=disable"
    return [f"trainer.resume_mode=auto: {fault}. {remedy}"]


def _path_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    text = str(config.trainer.resume_from_path)
    path, option = Path(text), f"trainer.resume_from_path={text}"
    if not re.fullmatch(r".*global_step_\d+", text):
        return [f"{option} must be a checkpoint's folder and end in global_step_N, without a slash behind"]
    if not path.is_dir():
        return [f"{option} does not exist"]
    lacks = missing_parts(path, config, sdar)
    return [f"{option} is not a checkpoint this run can go on from: {'; '.join(lacks)}"] if lacks else []


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(path.name.removeprefix("global_step_"), path) for path in folder.glob("global_step_*")]
    return sorted((int(step), path) for step, path in found if step.isdigit())


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more + (" are" if len(names) > 1 else " is")
