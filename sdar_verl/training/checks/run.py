"""What can be known to be wrong before Ray starts; each error names the option, the value and the remedy."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.compat import check_verl_version
from sdar_verl.config import SdarConfig
from sdar_verl.errors import ConfigError
from sdar_verl.modules import import_modules
from sdar_verl.panels import LOCATIONS, PanelError, read_panel
from sdar_verl.training.checks.cloud import cloud_faults
from sdar_verl.training.checks.context import context_faults
from sdar_verl.training.checks.engine import engine_faults, sequence_parallel
from sdar_verl.training.checks.loss import loss_faults
from sdar_verl.training.checks.modes import mode_faults, parts_of_a_step
from sdar_verl.training.checks.resume import resume_faults
from sdar_verl.training.checks.skills import skill_faults
from sdar_verl.training.checks.teacher import teacher_faults
from sdar_verl.training.panel_tasks import panel_files

RELEASED_METHODS = ("grpo", "skill_grpo", "skill_prompt", "opsd", "grpo_opsd", "skill_sd", "rlsd", "sdar")


def check_run(config: DictConfig, sdar: SdarConfig) -> None:
    """Check a run's whole config.

    Raises:
        ConfigError: with every fault that was found, one per line.
    """
    check_verl_version()
    faults = [fault for check in _CHECKS for fault in check(config, sdar)]
    if faults:
        raise ConfigError("\n".join(faults))


def _names(config: DictConfig, sdar: SdarConfig) -> list[str]:
    from sdar_verl.context import builtin  # noqa: F401  registers the contexts of this package
    from sdar_verl.context.registry import ContextError, check_contexts
    from sdar_verl.envs.registry import check_env
    from sdar_verl.rollout.prompts import PromptTemplate

    try:
        import_modules(sdar.all_modules)
    except ConfigError as error:
        return [str(error)]
    attempts = {
        "sdar.env": lambda: check_env(sdar.env.name, sdar.env.options),
        "sdar.prompt.template": lambda: PromptTemplate.load(sdar.prompt.template).check_rows(sdar.rollout.rows),
        "sdar.context.sources": lambda: check_contexts(sdar.context.sources, sdar.context.options),
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
    if estimator != "sdar" and sdar.advantage.invalid_action_penalty > 0:
        faults.append(
            f"sdar.advantage.invalid_action_penalty={sdar.advantage.invalid_action_penalty} has no effect with "
            f"algorithm.adv_estimator={estimator}; set it to 0 or use adv_estimator=sdar"
        )
    agent = config.actor_rollout_ref.rollout.agent.default_agent_loop
    if agent != "sdar_agent":
        faults.append(
            f"actor_rollout_ref.rollout.agent.default_agent_loop={agent} makes no teacher prompts; set it to sdar_agent"
        )
    if OmegaConf.select(config, "distillation.enabled"):
        faults.append("distillation.enabled=True is verl's own distillation with a separate teacher; set it to False")
    return faults


def _rows(config: DictConfig, sdar: SdarConfig) -> list[str]:
    rollout, limit = sdar.rollout, config.data.max_response_length
    if rollout.rows == "per_turn":
        if rollout.turn_length is not None:
            return [
                f"sdar.rollout.turn_length={rollout.turn_length} has no effect with sdar.rollout.rows=per_turn, where "
                "data.max_response_length is the limit of an answer; set it to null, or rows=trajectory"
            ]
        return []
    faults = []
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
    room, needed = config.actor_rollout_ref.rollout.max_model_len, config.data.max_prompt_length + limit
    if room is not None and room < needed:
        faults.append(
            f"actor_rollout_ref.rollout.max_model_len={room} is less than a conversation may have, "
            f"data.max_prompt_length + data.max_response_length = {needed}; raise it, or lower max_response_length"
        )
    if sdar.advantage.group_stats == "turn":
        faults.append(
            "sdar.advantage.group_stats=turn counts turn rows, sdar.rollout.rows=trajectory has none; use episode"
        )
    return faults


def _per_part(config: DictConfig) -> str:
    return " / parameter_sync_step" if parts_of_a_step(config) > 1 else ""


def _batches(config: DictConfig, sdar: SdarConfig) -> list[str]:
    n, rows = config.actor_rollout_ref.rollout.n, sdar.update.mini_batch_rows
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    ranks //= sequence_parallel(config.actor_rollout_ref.actor)[1]
    faults = []
    if rows is not None and rows % n:
        faults.append(f"sdar.update.mini_batch_rows={rows} must be a multiple of actor_rollout_ref.rollout.n={n}")
    if rows is not None and rows % ranks:
        faults.append(f"sdar.update.mini_batch_rows={rows} must be a multiple of the {ranks} ranks")
    if n < 2 and config.algorithm.adv_estimator == "sdar":
        faults.append(f"actor_rollout_ref.rollout.n={n}: group-relative advantages need at least 2 rollouts per task")
    if not config.actor_rollout_ref.actor.use_dynamic_bsz:
        micro = config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu
        mini = (rows if rows is not None else config.actor_rollout_ref.actor.ppo_mini_batch_size * n) // ranks
        if micro is not None and mini % micro:
            faults.append(
                f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={micro} does not divide the {mini} rows of a "
                "mini-batch on one rank; choose a divisor or set actor_rollout_ref.actor.use_dynamic_bsz=True"
            )
    return faults


def _data(config: DictConfig, sdar: SdarConfig) -> list[str]:
    lengths = {name: config.data[name] for name in ("max_prompt_length", "max_response_length")}
    faults = [
        f"data.{name}={value}: it is a number of tokens, at least 1" for name, value in lengths.items() if value < 1
    ]
    train_tasks = 0
    for option in ("train_files", "val_files"):
        if not config.data[option]:
            faults.append(
                f"data.{option} is not set; make the task panels with `sdar-verl prepare {sdar.env.name} --out DIR` "
                "and point to its parquet files"
            )
            continue
        for file in panel_files(config, option):
            path = Path(file)
            if not path.is_file():
                faults.append(
                    f"data.{option}={file} does not exist{_looked_for(path)}; make the task panels with "
                    f"`sdar-verl prepare {sdar.env.name} --out DIR` and point to its parquet files"
                )
                continue
            try:
                tasks = read_panel(path)
            except PanelError as error:
                faults.append(f"data.{option}: {error}")
                continue
            train_tasks += len(tasks) if option == "train_files" else 0
            others = {task.env for task in tasks} - {sdar.env.name}
            if others:
                faults.append(
                    f"data.{option}={file} holds tasks of {', '.join(sorted(others))}, "
                    f"but sdar.env.name={sdar.env.name}"
                )
            lost = sorted({task.data[key] for task in tasks for key in LOCATIONS if key in task.data})
            lost = [place for place in lost if not Path(place).exists()]
            if lost:
                faults.append(
                    f"data.{option}={file}: {len(lost)} of the files or folders that its tasks need are not there, "
                    f"such as {lost[0]} (moved or deleted since); make the panel again with "
                    f"`sdar-verl prepare {sdar.env.name} --out DIR`"
                )
    if not faults and 0 < train_tasks < config.data.train_batch_size:
        faults.append(
            f"data.train_batch_size={config.data.train_batch_size}, but data.train_files holds {train_tasks} tasks; "
            "prepare more, or lower the batch size"
        )
    return faults


def _looked_for(path: Path) -> str:
    """Where a relative path was looked for: the processes of a Ray cluster that runs already start elsewhere."""
    if path.is_absolute():
        return ""
    return (
        f" in {Path.cwd()} on {platform.node()} (a relative path is read from the working directory of each "
        "process, and on a Ray cluster that was started before that is another one: give an absolute path)"
    )


def _variant(config: DictConfig, sdar: SdarConfig) -> list[str]:
    if sdar.variant == "paper" or sdar.method in RELEASED_METHODS:
        return []
    return [
        f"sdar.variant=released has no effect with sdar.method={sdar.method}: the released code holds "
        f"{', '.join(RELEASED_METHODS)}; set variant=paper"
    ]


_CHECKS: tuple[Any, ...] = (
    _names,
    _actions,
    loss_faults,
    mode_faults,
    _modes,
    teacher_faults,
    _rows,
    skill_faults,
    context_faults,
    _batches,
    engine_faults,
    _variant,
    _data,
    resume_faults,
    cloud_faults,
)
