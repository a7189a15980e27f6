"""Checks of a recipe whose agent loops are verl's or the user's, before Ray starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pydantic import BaseModel

from sdar_verl.checks.panel_tasks import panel_files, read_rows
from sdar_verl.config import SdarConfig
from sdar_verl.panels import PanelError
from sdar_verl.recipe import AGENT_LOOP, plays_environments
from sdar_verl.rollout.messages import load_place
from sdar_verl.rollout.prompts import PromptTemplateError
from sdar_verl.untrusted import shorten

_ENVIRONMENTS = (
    *("env", "prompt", "advantage.invalid_action_penalty", "rollout.rows", "rollout.turn_length", "context.student"),
)
"""Options of the text environments alone."""
_RECIPES = ("context.place", "context.chat_template_kwargs", "context.on_foreign_prompt")
"""Options of other agent loops alone."""


def recipe_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every fault, one text each; of a text environment those options that are not for it."""
    agent = config.actor_rollout_ref.rollout.agent.default_agent_loop
    if plays_environments(config):
        return [
            f"{option} has no effect with the text environments of sdar.env (default_agent_loop={agent}); leave it out"
            for option in _changed(sdar, _RECIPES)
        ]
    faults = [
        f"{option} has no effect with actor_rollout_ref.rollout.agent.default_agent_loop={agent}: it is for the text "
        f"environments of {AGENT_LOOP}; leave it out"
        for option in _changed(sdar, _ENVIRONMENTS)
    ]
    if "skills" not in sdar.context.named:
        faults += [
            f"{option} has no effect with sdar.context.sources={sdar.context.sources}; add skills, or leave it out"
            for option in _changed(sdar, ("skills",))
        ]
    if sdar.teacher.source != "none":
        faults += _contexts(sdar)
    if sdar.teacher.on_long_prompt == "drop_history":
        faults.append(
            f"sdar.teacher.on_long_prompt=drop_history has no effect with default_agent_loop={agent}, whose prompts "
            "have no history of ours; use error or mask"
        )
    return [*faults, *(list(_data(config)) or _tokenisation(config))]


def _contexts(sdar: SdarConfig) -> Iterator[str]:
    context = sdar.context
    if context.sources == ["skills"] and sdar.skills.bank == SdarConfig().skills.bank:
        yield (
            "sdar.context.sources=[skills] is the default of the text environments; say what the teacher of this "
            "recipe shall see: sdar.context.sources=[answer] (the ground truth), [column] with "
            "sdar.context.options.column.path=extra_info.solution, [sibling], [feedback], or [skills] with "
            "sdar.skills.bank"
        )
    if "column" in context.sources and not context.options.get("column", {}).get("path"):
        yield (
            "sdar.context.sources: the context column needs sdar.context.options.column.path, a column of the data "
            "such as extra_info.solution"
        )
    try:
        load_place(context.place)
    except PromptTemplateError as error:
        yield str(error)


def _changed(sdar: SdarConfig, options: tuple[str, ...]) -> list[str]:
    """Those of ``options`` that are not at their defaults, as ``sdar.a.b=value``."""
    plain, found = SdarConfig(), []
    for option in options:
        mine, default = _get(sdar, option), _get(plain, option)
        if isinstance(mine, BaseModel):
            found += [f"sdar.{option}.{name}={value}" for name, value in mine if value != getattr(default, name)]
        elif mine != default:
            found.append(f"sdar.{option}={mine}")
    return found


def _get(node: Any, path: str) -> Any:
    for name in path.split("."):
        node = getattr(node, name)
    return node


def _data(config: DictConfig) -> Iterator[str]:
    key = config.data.get("prompt_key", "prompt")
    for option in ("train_files", "val_files"):
        if not config.data[option]:
            yield f"data.{option} is not set; give the Parquet files of your recipe"
            continue
        for file in panel_files(config, option):
            if not Path(file).is_file():
                yield f"data.{option}={file} does not exist; give the Parquet files of your recipe, by an absolute path"
                continue
            try:
                row = next(read_rows(file, 1), None)
            except PanelError as error:
                yield f"data.{option}: {error}"
                continue
            if row is None:
                yield f"data.{option}={file} holds no row"
            elif key not in row:
                yield (f"data.{option}={file} has no column {key!r} (data.prompt_key); it has {', '.join(sorted(row))}")
            elif not isinstance(row[key], list):
                yield (
                    f"data.{option}={file}: the column {key!r} holds {type(row[key]).__name__}, not a list of messages "
                    "with role and content, as verl's agent loops read it"
                )


def _tokenisation(config: DictConfig) -> Iterator[str]:
    """Whether verl's loops can make the first prompt at all; of a model that lies here, nothing is downloaded."""
    model = config.actor_rollout_ref.model
    if not Path(str(model.path)).is_dir():
        return
    from transformers import AutoTokenizer

    from sdar_verl.verl.recipe_prompts import model_type, prompt_maker

    file = panel_files(config, "train_files")[0]
    row = next(read_rows(file, 1))
    try:
        trust = model.get("trust_remote_code", False)
        tokenizer = AutoTokenizer.from_pretrained(model.get("tokenizer_path") or model.path, trust_remote_code=trust)
        make = prompt_maker(config, tokenizer, model_type(config))
        make([dict(message) for message in row[config.data.get("prompt_key", "prompt")]])
    except Exception as error:  # transformers, verl and a chat template raise many kinds
        yield (
            f"actor_rollout_ref.model.path={model.path}: verl's agent loops cannot make the prompt of the first row of "
            f"data.train_files={file} with its tokenizer ({type(error).__name__}: {shorten(str(error))}); use a model "
            "whose tokenizer has a chat template for these messages"
        )
