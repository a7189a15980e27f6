"""What can be wrong with ``sdar.skills.learn`` and is known before Ray starts."""

from __future__ import annotations

from collections import Counter

from omegaconf import DictConfig

from sdar_verl.checks.data import panel_faults
from sdar_verl.checks.panel_tasks import panel_tasks
from sdar_verl.config import LearnConfig, SdarConfig
from sdar_verl.recipe import plays_environments
from sdar_verl.rollout.rows import AFTER, BEFORE
from sdar_verl.skills.verdict import LEAST_TASKS

_NODE = "sdar.skills.learn"


def skill_learning_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Faults of the node, one text each."""
    learn, defaults = sdar.skills.learn, LearnConfig()
    if not learn.every:
        return [
            f"{_NODE}.{name}={getattr(learn, name)} has no effect with {_NODE}.every=0; set every, or leave it out"
            for name in LearnConfig.model_fields
            if getattr(learn, name) != getattr(defaults, name)
        ]
    if not plays_environments(config):
        return [
            f"{_NODE}.every={learn.every} plays tasks of the text environments to judge what was written; with agent "
            "loops of verl's or yours use `sdar-verl skills learn` on a run's traces, and every=0 here"
        ]
    faults = [*_shown(sdar), *_judged(config, sdar)]
    if sdar.skills.max_tokens is None:
        faults.append(
            f"{_NODE}.every={learn.every} needs sdar.skills.max_tokens, the tokens of one task's skills: a bank that "
            "grows must not outgrow the prompts"
        )
    elif sdar.skills.max_tokens >= config.data.max_prompt_length:
        faults.append(
            f"sdar.skills.max_tokens={sdar.skills.max_tokens}: {_NODE} shows them to the student, whose prompt has "
            f"data.max_prompt_length={config.data.max_prompt_length} tokens in all; lower one, or raise the other"
        )
    if taken := {BEFORE, AFTER} & set(sdar.validation.arms):
        faults.append(f"sdar.validation.arms.{min(taken)}: {_NODE} judges by an arm of this name; choose another")
    return faults + _panel(config, sdar)


def _shown(sdar: SdarConfig) -> list[str]:
    """Somebody must be shown skills of the bank."""
    drawing = [name for name in sdar.skills.retrieval if name in ("random", "ucb")]
    if drawing or not set(sdar.skills.retrieval) - {"keyword", "none", "oracle"}:
        return [
            f"{_NODE}.every={sdar.skills.learn.every}: sdar.skills.retrieval={sdar.skills.retrieval} does not show "
            "every task of a type what was written for it (a written skill has no keywords, and random and ucb draw); "
            "use rules such as [keyword,task_type]"
        ]
    taught = sdar.teacher.source != "none" and "skills" in sdar.context.named
    if (
        taught
        or sdar.context.student == "skills"
        or any(arm.context == "skills" for arm in sdar.validation.arms.values())
    ):
        return []
    return [
        f"{_NODE}.every={sdar.skills.learn.every} has no effect: nobody is shown skills. Name skills in "
        "sdar.context.sources, or set sdar.context.student=skills"
    ]


def _judged(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """What was written in a step is judged by the validation of that step."""
    every, freq = sdar.skills.learn.every, config.trainer.test_freq
    if freq > 0 and every % freq == 0:
        return []
    return [
        f"{_NODE}.every={every} is no multiple of trainer.test_freq={freq}: what is written in a step is judged by its "
        "validation; set one of them accordingly"
    ]


def _panel(config: DictConfig, sdar: SdarConfig) -> list[str]:
    panel = sdar.skills.learn.panel
    if panel is None:
        return [
            f"{_NODE}.every={sdar.skills.learn.every} needs {_NODE}.panel, the tasks that decide; make them with "
            f"`sdar-verl prepare {sdar.env.name} --out DIR`"
        ]
    tasks, faults = panel_faults(f"{_NODE}.panel", panel, sdar)
    if faults:
        return faults
    counts = Counter(task.task_type for task in tasks)
    few = sorted({t.task_type for t in panel_tasks(config, "train_files") if counts[t.task_type] < LEAST_TASKS})
    if few:
        faults.append(
            f"{_NODE}.panel={panel} has fewer than {LEAST_TASKS} tasks of {', '.join(few)}, which training plays: no "
            "skill for these could be taken; name a larger panel"
        )
    for option in ("train_files", "val_files"):
        shared = sorted({task.task_id for task in tasks} & {task.task_id for task in panel_tasks(config, option)})
        if shared:
            faults.append(
                f"{_NODE}.panel={panel} shares {len(shared)} tasks with data.{option}, {shared[0]} for one: a skill "
                "must prove itself on tasks that neither training nor validation sees; name another panel"
            )
    return faults
