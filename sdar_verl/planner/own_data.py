"""What a plan reads off the run's own data, where they lie here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import NamedTuple

from omegaconf import DictConfig

from sdar_verl.checks.data import step_faults, steps_per_epoch
from sdar_verl.checks.panel_tasks import panel_files, row_count
from sdar_verl.checks.prompt_lengths import PromptsUnknown, prompt_lengths
from sdar_verl.checks.recipe import names_no_context
from sdar_verl.config import SdarConfig, played_arms
from sdar_verl.panels import PanelError
from sdar_verl.planner.layout import Layout
from sdar_verl.recipe import plays_environments

MEASURED_ROWS = 1000
"""Rows of a recipe's data whose prompts are made."""


class OwnData(NamedTuple):
    """What a run's own data show.

    Attributes:
        notes: what to say of them.
        stops: why a run on these data would stop.
        lengths: for :meth:`Layout.from_config`, as far as the data tell them.
    """

    notes: Sequence[str] = ()
    stops: Sequence[str] = ()
    lengths: Mapping[str, float] = MappingProxyType({})


def read_layout(
    config: DictConfig, sdar: SdarConfig, given: Mapping[str, float | None] | None = None
) -> tuple[Layout, list[str], list[str]]:
    """The layout of a run, with what its own data tell where they lie here.

    Args:
        config: verl's, composed from a recipe.
        sdar: its ``sdar`` node.
        given: lengths of :meth:`Layout.from_config` that somebody gave, which win; None: nobody did.

    Returns:
        The layout, what to say of it, and why the run would not start.

    Raises:
        ConfigError: a model the planner does not know.
    """
    own, rows = read_data(config, sdar), train_rows(config)
    steps = count_steps(config, rows)
    validations, missing = count_validations(config, sdar, steps)
    lengths = {**own.lengths} | {name: value for name, value in (given or {}).items() if value is not None}
    layout = Layout.from_config(config, sdar, steps=steps, validations=validations, **lengths)
    return layout, [*own.notes, *missing], [*own.stops, *(step_faults(config, rows) if rows else [])]


def train_rows(config: DictConfig) -> int:
    """Rows of ``data.train_files``; 0 where the files are not here."""
    try:
        return sum(row_count(file) for file in panel_files(config, "train_files"))
    except (PanelError, OSError, ValueError):
        return 0


def count_steps(config: DictConfig, rows: int) -> int:
    """Training steps of a run: ``trainer.total_training_steps``, or what verl makes of ``trainer.total_epochs`` and
    so many rows; 0 where nobody knows."""
    given, epochs = config.trainer.total_training_steps, config.trainer.get("total_epochs", None)
    return int(given or 0) if given is not None or not epochs else int(epochs * steps_per_epoch(config, rows))


def count_validations(config: DictConfig, sdar: SdarConfig, steps: int) -> tuple[list[tuple[int, int]], list[str]]:
    """The run's validations, those that judge learned skills among them (``sdar.skills.learn``).

    Returns:
        How many there are, and of how many episodes each; what is not known of them.
    """
    trainer, rollouts = config.trainer, int(config.actor_rollout_ref.rollout.val_kwargs.n)
    every = int(trainer.test_freq)
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


def read_data(config: DictConfig, sdar: SdarConfig) -> OwnData:
    """The lengths that a recipe's own data show, and the share of rows with a context.

    Nothing for the text environments, whose prompts grow with the episode.
    """
    files = panel_files(config, "train_files")
    if plays_environments(config) or not files:
        return OwnData()
    if missing := [file for file in files if not Path(file).is_file()]:
        return OwnData([f"data.train_files: {missing[0] or 'no file'} is not here, so lengths are guesses"])
    if sdar.teacher.source != "none" and names_no_context(sdar):
        why = "sdar.context.sources says what the teacher of this recipe sees, and names nothing of it"
        return OwnData(stops=[why])
    from sdar_verl.verl.recipe_prompts import policy_tokenizer

    try:
        tokenizer = policy_tokenizer(config)
    except (OSError, ValueError):
        path = config.actor_rollout_ref.model.path
        return OwnData([f"the tokenizer of actor_rollout_ref.model.path={path} is not here, so lengths are guesses"])
    try:
        found = prompt_lengths(config, sdar, tokenizer, MEASURED_ROWS)
    except PanelError as error:
        return OwnData([f"data.train_files is not read: {error}"])
    except PromptsUnknown as error:
        note = f"lengths are guesses, since no prompt can be made of data.train_files: {error}"
        return OwnData([note], [str(error)])
    prompts, further = found.in_run(config, sdar)
    if not prompts:
        return OwnData(["data.train_files has no row that data.max_prompt_length leaves"], ["no row is left"])
    told = f"{len(prompts)} rows of data.train_files: prompts of {mean(prompts):.0f} tokens in the mean"
    if len(prompts) < found.rows:
        told += f" ({found.rows - len(prompts)} longer ones are left out)"
    lengths: dict[str, float] = {"prompt": round(mean(prompts))}
    stops = []
    if sdar.teacher.source != "none" and not found.late:
        share, adds = len(further) / len(prompts), mean(further) if further else 0.0
        told += f", {share:.0%} have a context that fits, of {adds:.0f} tokens"
        lengths |= {"context": round(adds), "taught_rows": share}
        if not further:
            stops.append("no row has a context that fits")
        elif sdar.teacher.on_long_prompt == "error" and found.teacher.longest > sdar.teacher.max_prompt_length:
            stops.append(
                f"a teacher's prompt has {found.teacher.longest} tokens, above sdar.teacher.max_prompt_length="
                f"{sdar.teacher.max_prompt_length} (sdar.teacher.on_long_prompt=error)"
            )
    return OwnData([told], stops, lengths)
