"""What can be known to be wrong before Ray starts; each error names the option, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.checks.advantage import advantage_faults
from sdar_verl.checks.architecture import architecture_faults
from sdar_verl.checks.chat_template import chat_template_faults
from sdar_verl.checks.cloud import cloud_faults
from sdar_verl.checks.context import context_faults
from sdar_verl.checks.data import data_faults
from sdar_verl.checks.engine import (
    engine_faults,
    frozen_models,
    sequence_parallel,
    strategy_faults,
    trained_devices,
)
from sdar_verl.checks.loss import loss_faults
from sdar_verl.checks.modes import mode_faults, parts_of_a_step
from sdar_verl.checks.options import (
    choice_faults,
    dataclass_faults,
    missing_faults,
    optimizer_faults,
    option_faults,
    path_faults,
    type_faults,
    verl_defaults,
)
from sdar_verl.checks.recipe import names_no_context, recipe_faults
from sdar_verl.checks.resume import resume_faults
from sdar_verl.checks.servers import server_faults
from sdar_verl.checks.skill_learning import skill_learning_faults
from sdar_verl.checks.skills import skill_faults
from sdar_verl.checks.teacher import teacher_faults
from sdar_verl.checks.writer import writer_faults
from sdar_verl.compat import check_verl_version
from sdar_verl.config import SdarConfig
from sdar_verl.context.registry import context_names, get_context
from sdar_verl.errors import ConfigError
from sdar_verl.modules import import_modules
from sdar_verl.recipe import plays_environments
from sdar_verl.verl.resume import experiment_faults

RELEASED_METHODS = ("grpo", "skill_grpo", "skill_prompt", "opsd", "grpo_opsd", "skill_sd", "rlsd", "sdar")


def check_run(config: DictConfig, sdar: SdarConfig) -> None:
    """Check a run's whole config.

    Raises:
        ConfigError: with every fault that was found, one per line.
    """
    check_verl_version()
    checks = [check for check in _CHECKS if plays_environments(config) or check not in _OF_ENVIRONMENTS]
    shows_skills = sdar.teacher.source != "none" and "skills" in sdar.context.named and not names_no_context(sdar)
    if not plays_environments(config) and not shows_skills:
        checks.remove(skill_faults)
    # Each of these calculates with what the ones before have found sound.
    faults = (
        strategy_faults(config, sdar)
        or missing_faults(config)
        or type_faults(config, sdar)
        or [fault for check in checks for fault in check(config, sdar)]
    )
    # Last, for the words of others name neither option nor remedy.
    faults = faults or dataclass_faults(config) or optimizer_faults(config)
    if faults:
        raise ConfigError("\n".join(faults))


def _names(config: DictConfig, sdar: SdarConfig) -> list[str]:
    from sdar_verl.context import builtin  # noqa: F401  registers the contexts of this package
    from sdar_verl.context.registry import ContextError, check_contexts
    from sdar_verl.envs.registry import check_env
    from sdar_verl.rollout.prompts import PromptTemplate

    try:
        import_modules(sdar.modules)
    except ConfigError as error:
        return [str(error)]
    bad = sdar.context.contrast
    attempts = {
        "sdar.context.sources": lambda: check_contexts(sdar.context.sources, sdar.context.options),
        "sdar.context.contrast": lambda: check_contexts(bad.sources, bad.options, "sdar.context.contrast"),
    }
    if plays_environments(config):
        attempts |= {
            "sdar.env": lambda: check_env(sdar.env.name, sdar.env.options),
            "sdar.prompt.template": lambda: PromptTemplate.load(sdar.prompt.template).check_rows(sdar.rollout.rows),
        }
    faults = []
    for option, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, ImportError, OSError, ContextError) as error:
            faults.append(f"{option}: {error}")
    return faults


def _actions(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Environment and template must agree on the action's tags, the environment's and the pool's time limits too."""
    from sdar_verl.envs.registry import make_env
    from sdar_verl.rollout.prompts import PromptTemplate

    try:
        env = make_env(sdar.env.name, **sdar.env.options)
        template = PromptTemplate.load(sdar.prompt.template)
    except (ValueError, ImportError, OSError):
        return []  # named by _names
    faults = []
    if set(template.action_tags) != set(env.action_tags):
        faults.append(
            f"sdar.prompt.template={sdar.prompt.template} asks for the tags {_tags(template.action_tags)}, but "
            f"sdar.env.name={sdar.env.name} reads {_tags(env.action_tags)}; choose the environment's own template, or "
            f"declare its tags in yours: {{% set action_tags = {list(env.action_tags)} %}}"
        )
    limits = {"step_timeout_s": sdar.env.step_timeout_s, "reset_timeout_s": sdar.env.reset_timeout_s}
    faults += [
        f"sdar.env.{name}={limit:g} is less than the {env.longest_step_s:g} s that the environment may wait by its own "
        f"options (sdar.env.options), and would cost a whole process; raise sdar.env.{name} to at least "
        f"{env.longest_step_s:g}"
        for name, limit in limits.items()
        if env.longest_step_s > limit
    ]
    return faults


def _tags(names: tuple[str, ...]) -> str:
    return ", ".join(f"<{name}>" for name in names)


def _modes(config: DictConfig, sdar: SdarConfig) -> list[str]:
    faults = []
    estimator = config.algorithm.adv_estimator
    if not config.trainer.get("use_v1", True):
        faults.append("trainer.use_v1=False: SDAR runs on verl's v1 trainer; leave it at True")
    if estimator != "sdar" and sdar.advantage.invalid_action_penalty > 0 and plays_environments(config):
        faults.append(
            f"sdar.advantage.invalid_action_penalty={sdar.advantage.invalid_action_penalty} has no effect with "
            f"algorithm.adv_estimator={estimator}; set it to 0 or use adv_estimator=sdar"
        )
    faults += _registered_in_verl(config)
    if OmegaConf.select(config, "distillation.enabled"):
        faults.append("distillation.enabled=True is verl's own distillation with a separate teacher; set it to False")
    return faults


_ESTIMATORS = {
    "gae": "needs a critic, and there is none",
    "remax": "needs the reward of a greedy answer, which verl's v1 trainer does not ask for",
    "gdpo": "needs the parts of the reward, which verl's v1 trainer does not hand to it",
    "optimal_token_baseline": "needs sums over the vocabulary, which verl's v1 trainer does not compute",
    "tir_optimal_token_baseline": "needs sums over the vocabulary, which verl's v1 trainer does not compute",
}
"""Estimators of verl's that fail in the first step of its v1 trainer; the others are tested."""


def _registered_in_verl(config: DictConfig) -> list[str]:
    """Names that verl looks up in the first step, when the rollout is done."""
    estimator, loss = config.algorithm.adv_estimator, config.actor_rollout_ref.actor.policy_loss.loss_mode
    faults = []
    if why := _ESTIMATORS.get(str(estimator)):
        faults.append(f"algorithm.adv_estimator={estimator} {why}; use sdar, grpo, rloo, reinforce_plus_plus, ...")
    if estimator == "sdar" and config.algorithm.get("gamma", 1.0) != 1.0:
        faults.append(
            f"algorithm.gamma={config.algorithm.gamma} has no effect with algorithm.adv_estimator=sdar, which compares "
            "whole episodes; leave it at 1.0"
        )
    if (estimator, loss) == ("sdar", "vanilla"):
        return faults  # verl's registry takes seconds to import
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

    estimators = {str(getattr(key, "value", key)) for key in ADV_ESTIMATOR_REGISTRY} | {"sdar"}
    for option, name, known in (
        ("algorithm.adv_estimator", estimator, estimators),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", loss, {*POLICY_LOSS_REGISTRY}),
    ):
        if name not in known:
            faults.append(f"{option}={name}: verl knows {', '.join(sorted(known))}")
    return faults


def _room(config: DictConfig, sdar: SdarConfig) -> list[str]:
    room, prompt = config.actor_rollout_ref.rollout.max_model_len, config.data.max_prompt_length
    needed = prompt + config.data.max_response_length
    if not plays_environments(config):  # verl's loops let an answer end where the model does
        fault = f"actor_rollout_ref.rollout.max_model_len={room} leaves no room behind data.max_prompt_length={prompt}"
        return [f"{fault}; raise it, or lower that"] if room is not None and room <= prompt else []
    if room is None or room >= needed:
        return []
    return [
        f"actor_rollout_ref.rollout.max_model_len={room} is less than a row may have, "
        f"data.max_prompt_length + data.max_response_length = {needed}; raise it, or lower one of them"
    ]


def _rows(config: DictConfig, sdar: SdarConfig) -> list[str]:
    rollout, limit = sdar.rollout, config.data.max_response_length
    faults = []
    if rollout.rows == "per_turn":
        if rollout.turn_length is not None:
            faults.append(
                f"sdar.rollout.turn_length={rollout.turn_length} has no effect with sdar.rollout.rows=per_turn, where "
                "data.max_response_length is the limit of an answer; set it to null, or rows=trajectory"
            )
        return faults
    if rollout.turn_length is None or rollout.turn_length > limit:
        faults.append(
            f"sdar.rollout.turn_length={'null' if rollout.turn_length is None else rollout.turn_length}: with "
            "sdar.rollout.rows=trajectory, set the tokens of one answer, at most those of the whole conversation "
            f"(data.max_response_length={limit})"
        )
    if sdar.prompt.history_length > 0:
        faults.append(
            f"sdar.prompt.history_length={sdar.prompt.history_length} has no effect with sdar.rollout.rows=trajectory, "
            "whose row holds the whole conversation; set it to 0"
        )
    episodes = config.data.train_batch_size // parts_of_a_step(config) * config.actor_rollout_ref.rollout.n
    mini_batch = sdar.update.mini_batch_rows
    if mini_batch is not None and mini_batch > episodes:
        faults.append(
            f"sdar.update.mini_batch_rows={mini_batch}, but with sdar.rollout.rows=trajectory a step has {episodes} "
            f"rows (data.train_batch_size * rollout.n{_per_part(config)}), and verl would fill it up with padding; set "
            f"it to {episodes} or a divisor"
        )
    return faults


def _per_part(config: DictConfig) -> str:
    return " / parameter_sync_step" if parts_of_a_step(config) > 1 else ""


def _batches(config: DictConfig, sdar: SdarConfig) -> list[str]:
    n, rows = config.actor_rollout_ref.rollout.n, sdar.update.mini_batch_rows
    devices, _ = trained_devices(config)
    _, together = sequence_parallel(config.actor_rollout_ref.actor)
    faults = _devices(config, sdar)
    if devices % together:
        return faults
    ranks = devices // together
    if rows is not None and rows % n:
        faults.append(f"sdar.update.mini_batch_rows={rows} must be a multiple of actor_rollout_ref.rollout.n={n}")
    own = config.actor_rollout_ref.actor.ppo_mini_batch_size
    idle = own not in (config.data.train_batch_size, verl_defaults()["actor_rollout_ref.actor.ppo_mini_batch_size"])
    if rows is not None and idle and parts_of_a_step(config) == 1:
        faults.append(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={own} has no effect with sdar.update.mini_batch_rows={rows}, "
            "which says how many rows an update takes; set that, or sdar.update.mini_batch_rows=null to count in "
            f"prompts, and leave ppo_mini_batch_size at data.train_batch_size={config.data.train_batch_size}"
        )
    if rows is not None and rows % ranks:
        faults.append(f"sdar.update.mini_batch_rows={rows} must be a multiple of the {ranks} ranks")
    mini_batch = config.actor_rollout_ref.actor.ppo_mini_batch_size * n if rows is None else rows
    filled, (option, apart) = math.lcm(ranks, mini_batch), sequence_parallel(config.actor_rollout_ref.ref)
    for _, cards, where in frozen_models(config, sdar):
        if cards % apart == 0 and filled % (cards // apart):
            faults.append(
                f"{where}, with actor_rollout_ref.ref.{option}={apart}: the {cards // apart} ranks do not divide the "
                f"rows of a step, which verl fills up to a multiple of {filled} (the actor's {ranks} ranks, "
                f"mini-batches of {mini_batch} rows); choose a divisor of it"
            )
            break
    if n < 2 and config.algorithm.adv_estimator == "sdar":
        faults.append(f"actor_rollout_ref.rollout.n={n}: group-relative advantages need at least 2 rollouts per task")
    of_group = [name for name in sdar.context.named if name in context_names() and get_context(name).of_group]
    if n < 2 and of_group and sdar.teacher.source != "none":
        faults.append(
            f"actor_rollout_ref.rollout.n={n}: the context {of_group[0]} is made of other rollouts of the same prompt, "
            "and there is none; use at least 2, or another context"
        )
    if not config.actor_rollout_ref.actor.use_dynamic_bsz:
        micro = config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu
        mini = mini_batch // ranks
        if micro is not None and mini % micro:
            faults.append(
                f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={micro} does not divide the {mini} rows of a "
                "mini-batch on one rank; choose a divisor or set actor_rollout_ref.actor.use_dynamic_bsz=True"
            )
    return faults


def _devices(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """What verl's workers assert or divide by when they are made."""
    node, faults = config.actor_rollout_ref, dict[Any, str]()
    engines = [("actor", *trained_devices(config))]
    engines += [("ref", devices, where) for _, devices, where in frozen_models(config, sdar)]
    for role, devices, where in engines:
        sizes, shards = [sequence_parallel(node[role])], node[role].fsdp_config.fsdp_size
        if 0 < shards < devices:  # any other stands for all of them
            sizes.append(("fsdp_config.fsdp_size", shards))
        for option, size in sizes:
            if devices % size:
                fault = f"actor_rollout_ref.{role}.{option}={size} does not divide the {devices} devices ({where})"
                # The reference's may be the actor's.
                faults.setdefault((option, size, where), f"{fault}; choose a divisor")
    return [*faults.values(), *_passes(config)]


def _passes(config: DictConfig) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    if not rollout.log_prob_use_dynamic_bsz and rollout.log_prob_micro_batch_size_per_gpu is None:
        yield (
            "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=False needs "
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu, the rows of one pass; set it"
        )


def _variant(config: DictConfig, sdar: SdarConfig) -> list[str]:
    if sdar.variant == "paper" or sdar.method in RELEASED_METHODS:
        return []
    return [
        f"sdar.variant=released has no effect with sdar.method={sdar.method}: the released code holds "
        f"{', '.join(RELEASED_METHODS)}; set variant=paper"
    ]


_CHECKS: tuple[Any, ...] = (
    option_faults,
    choice_faults,
    path_faults,
    _names,
    _actions,
    loss_faults,
    mode_faults,
    _modes,
    teacher_faults,
    _room,
    _rows,
    advantage_faults,
    skill_faults,
    skill_learning_faults,
    context_faults,
    writer_faults,
    _batches,
    engine_faults,
    server_faults,
    chat_template_faults,
    architecture_faults,
    _variant,
    data_faults,
    recipe_faults,
    resume_faults,
    experiment_faults,
    cloud_faults,
)
_OF_ENVIRONMENTS = (_actions, _rows, data_faults)
