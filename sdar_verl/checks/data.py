"""Checks of the task panels, and of the steps they are enough for, before Ray starts."""

from __future__ import annotations

import platform
from pathlib import Path

from omegaconf import DictConfig

from sdar_verl.checks.panel_tasks import panel_files
from sdar_verl.config import SdarConfig
from sdar_verl.envs.base import Task
from sdar_verl.envs.registry import tasks_fault
from sdar_verl.panels import PanelError, missing_files, read_panel


def data_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every fault of panels and steps, one text each."""
    faults = []
    train_tasks = 0
    for option in ("train_files", "val_files"):
        if not config.data[option]:
            faults.append(
                f"data.{option} is not set; make the task panels with `sdar-verl prepare {sdar.env.name} --out DIR` "
                "and point to its parquet files"
            )
            continue
        for file in panel_files(config, option):
            tasks, found = panel_faults(f"data.{option}", file, sdar)
            faults += found
            train_tasks += len(tasks) if option == "train_files" else 0
    return faults or (step_faults(config, train_tasks) if train_tasks else [])


def panel_faults(option: str, file: str, sdar: SdarConfig) -> tuple[list[Task], list[str]]:
    """Tasks of a panel that an option names, and what is wrong with it, one text each."""
    path, faults = Path(file), []
    if path.is_dir():
        return [], [f"{option}={file} is a folder; name a Parquet file in it"]
    if not path.is_file():
        return [], [
            f"{option}={file} does not exist{_looked_for(path)}; make the task panels with "
            f"`sdar-verl prepare {sdar.env.name} --out DIR` and point to its parquet files"
        ]
    try:
        tasks = read_panel(path)
    except PanelError as error:
        return [], [f"{option}: {error}"]
    others = {task.env for task in tasks} - {sdar.env.name}
    if others:
        faults.append(f"{option}={file} holds tasks of {', '.join(sorted(others))}, but sdar.env.name={sdar.env.name}")
    if lost := missing_files(tasks):
        faults.append(
            f"{option}={file}: {len(lost)} of the files or folders that its tasks need are not there, such as "
            f"{lost[0]} (moved or deleted since); run the `sdar-verl prepare {sdar.env.name}` command that made the "
            "panel again, with the folder where it lies now"
        )
    if fault := tasks_fault(sdar.env.name, sdar.env.options, tasks):
        faults.append(f"{option}={file}: {fault}")
    return tasks, faults


def steps_per_epoch(config: DictConfig, rows: int) -> int:
    """verl's, of ``data.train_files`` with so many rows: it drops the rest of a batch."""
    limit = config.data.get("train_max_samples", -1)
    return (min(rows, limit) if limit > 0 else rows) // int(config.data.train_batch_size)


def step_faults(config: DictConfig, tasks: int) -> list[str]:
    """verl starts an epoch of ``tasks // train_batch_size`` steps, drops the rest of the panel, and ends with the last
    of ``total_epochs``, whatever ``total_training_steps`` says: then without a checkpoint or a validation."""
    data, trainer = config.data, config.trainer
    limit = data.get("train_max_samples", -1)
    if 0 < limit < tasks:
        tasks, held = limit, f"data.train_max_samples={limit} leaves {limit} tasks of data.train_files"
    else:
        held = f"data.train_files holds {tasks} tasks"
    if tasks < data.train_batch_size:
        more = "raise it" if limit == tasks else "prepare more"
        return [f"data.train_batch_size={data.train_batch_size}, but {held}; {more}, or lower the batch size"]
    at_a_time = data.get("gen_batch_size", None) or data.train_batch_size
    if data.train_batch_size % at_a_time:
        return [
            f"data.gen_batch_size={at_a_time} does not divide data.train_batch_size={data.train_batch_size}, which "
            "verl fetches in parts of that size; set one that does, or null"
        ]
    steps = steps_per_epoch(config, tasks)
    epochs, wanted = trainer.get("total_epochs", None), trainer.total_training_steps
    if wanted is None or epochs is None or epochs * steps >= wanted:
        return []
    return [
        f"trainer.total_epochs={epochs} ends the run after {epochs * steps} steps, before "
        f"trainer.total_training_steps={wanted} and without a last checkpoint: {held}, {steps} steps of "
        f"data.train_batch_size={data.train_batch_size} an epoch. Set total_epochs to at least {-(-wanted // steps)}"
    ]


def _looked_for(path: Path) -> str:
    """Where a relative path was looked for: the processes of a Ray cluster that runs already start elsewhere."""
    if path.is_absolute():
        return ""
    return (
        f" in {Path.cwd()} on {platform.node()} (a relative path is read from the working directory of each "
        "process, and on a Ray cluster that was started before that is another one: give an absolute path)"
    )
