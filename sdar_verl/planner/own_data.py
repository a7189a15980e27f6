"""What a plan reads off the run's own data, where they lie here."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import DictConfig

from sdar_verl.checks.data import steps_per_epoch
from sdar_verl.checks.panel_tasks import panel_files, row_count
from sdar_verl.checks.prompt_lengths import PromptsUnknown, prompt_lengths
from sdar_verl.checks.recipe import names_no_context
from sdar_verl.config import SdarConfig, played_arms
from sdar_verl.panels import PanelError
from sdar_verl.recipe import plays_environments

MEASURED_ROWS = 1000
"""Rows of a recipe's data whose prompts are made."""


def count_steps(config: DictConfig) -> None:
    """Where ``trainer.total_epochs`` says how long a run is, set the steps that verl makes of data that are here."""
    files, epochs = panel_files(config, "train_files"), config.trainer.get("total_epochs", None)
    if config.trainer.total_training_steps is not None or not files or not epochs:
        return
    try:
        rows = sum(row_count(file) for file in files)
    except (PanelError, OSError, ValueError):
        return
    config.trainer.total_training_steps = epochs * steps_per_epoch(config, rows) or None


def count_validations(config: DictConfig, sdar: SdarConfig) -> tuple[list[tuple[int, int]], list[str]]:
    """The run's validations, those that judge learned skills among them (``sdar.skills.learn``).

    Returns:
        How many there are, and of how many episodes each; what is not known of them.
    """
    trainer, steps = config.trainer, int(config.trainer.total_training_steps or 0)
    every, rollouts = int(trainer.test_freq), int(config.actor_rollout_ref.rollout.val_kwargs.n)
    times = -(-steps // every) if every > 0 else 0  # verl validates after the last step, too
    times += bool(trainer.get("val_before_train", True))
    if trainer.get("val_only", False):
        times = 1
    panel, learn = panel_files(config, "val_files"), sdar.skills.learn
    played = [(times, len(played_arms(sdar.validation.arms, plays_environments(config))), panel, "data.val_files")]
    if learn.every:
        played.append((steps // learn.every, 2, [str(learn.panel)], "sdar.skills.learn.panel"))
    found, missing = [], []
    for number, arms, files, option in played:
        if not number:
            continue
        try:
            rows = sum(row_count(file) for file in files)
        except (PanelError, OSError, ValueError):
            rows = 0
        if option == "data.val_files" and (most := int(config.data.get("val_max_samples", -1))) > 0:
            rows = min(rows, most)
        if rows:
            found.append((number, rows * arms * rollouts))
        else:
            missing.append(f"{number} validations over {option} are not in the hours, since it cannot be read here")
    return found, missing


def read_data(config: DictConfig, sdar: SdarConfig, lengths: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Fill in the lengths that nobody gave and a recipe's own data show, and the share of rows with a context.

    Nothing for the text environments, whose prompts grow with the episode.

    Returns:
        What to say of it, and why a run on these data would stop.
    """
    files = panel_files(config, "train_files")
    if plays_environments(config) or not files:
        return [], []
    if missing := [file for file in files if not Path(file).is_file()]:
        return [f"data.train_files: {missing[0] or 'no file'} is not here, so lengths are guesses"], []
    if sdar.teacher.source != "none" and names_no_context(sdar):
        return [], ["sdar.context.sources says what the teacher of this recipe sees, and names nothing of it"]
    from sdar_verl.verl.recipe_prompts import policy_tokenizer

    try:
        tokenizer = policy_tokenizer(config)
    except (OSError, ValueError):
        path = config.actor_rollout_ref.model.path
        return [f"the tokenizer of actor_rollout_ref.model.path={path} is not here, so lengths are guesses"], []
    try:
        found = prompt_lengths(config, sdar, tokenizer, MEASURED_ROWS)
    except PanelError as error:
        return [f"data.train_files is not read: {error}"], []
    except PromptsUnknown as error:
        return [f"lengths are guesses, since no prompt can be made of data.train_files: {error}"], [str(error)]
    prompts, further = found.in_run(config, sdar)
    if not prompts:
        return ["data.train_files has no row that data.max_prompt_length leaves"], ["no row is left"]
    told = f"{len(prompts)} rows of data.train_files: prompts of {mean(prompts):.0f} tokens in the mean"
    if len(prompts) < found.rows:
        told += f" ({found.rows - len(prompts)} longer ones are left out)"
    if lengths["prompt"] is None:
        lengths["prompt"] = round(mean(prompts))
    stops = []
    if sdar.teacher.source != "none" and not found.late:
        share, adds = len(further) / len(prompts), mean(further) if further else 0.0
        told += f", {share:.0%} have a context that fits, of {adds:.0f} tokens"
        lengths["context"] = round(adds) if lengths["context"] is None else lengths["context"]
        lengths["taught_rows"] = share
        if not further:
            stops.append("no row has a context that fits")
        elif sdar.teacher.on_long_prompt == "error" and found.teacher.longest > sdar.teacher.max_prompt_length:
            stops.append(
                f"a teacher's prompt has {found.teacher.longest} tokens, above sdar.teacher.max_prompt_length="
                f"{sdar.teacher.max_prompt_length} (sdar.teacher.on_long_prompt=error)"
            )
    return [told], stops
