"""Checks of a recipe whose agent loops are verl's or the user's, before Ray starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig
from pydantic import BaseModel

from sdar_verl.checks.recipe_data import recipe_data_faults
from sdar_verl.config import SdarConfig
from sdar_verl.recipe import AGENT_LOOP, plays_environments
from sdar_verl.rollout.messages import load_place
from sdar_verl.rollout.prompts import PromptTemplateError

_ENVIRONMENTS = (
    *("env", "prompt", "advantage.invalid_action_penalty", "rollout.rows", "rollout.turn_length", "context.student"),
)
"""Options of the text environments alone."""
_RECIPES = ("skills.column", "context.place", "context.chat_template_kwargs", "context.on_foreign_prompt")
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
    if "skills" not in sdar.context.named:
        faults += [
            f"sdar.validation.arms.{name}.context=skills has none to show: sdar.context.sources={sdar.context.sources} "
            "loads no bank; add skills there, or use context=teacher"
            for name, arm in sdar.validation.arms.items()
            if arm.context == "skills"
        ]
    if sdar.teacher.on_long_prompt == "drop_history":
        faults.append(
            f"sdar.teacher.on_long_prompt=drop_history has no effect with default_agent_loop={agent}, whose prompts "
            "have no history of ours; use error or mask"
        )
    return [*faults, *recipe_data_faults(config, sdar)]


def names_no_context(sdar: SdarConfig) -> bool:
    """Whether the context is still the default, the skills of a text environment."""
    return sdar.context.sources == ["skills"] and sdar.skills.bank == SdarConfig().skills.bank


def _contexts(sdar: SdarConfig) -> Iterator[str]:
    if names_no_context(sdar):
        yield (
            "sdar.context.sources=[skills] is the default of the text environments; say what the teacher of this "
            "recipe shall see: sdar.context.sources=[answer] (the ground truth), [column] with "
            "+sdar.context.options.column.path=extra_info.solution, [sibling], [feedback], or [skills] with "
            "sdar.skills.bank"
        )
    try:
        load_place(sdar.context.place)
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
