"""What can be wrong with ``sdar.context`` and is known before Ray starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from inspect import signature
from itertools import product
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdar_verl.checks.options import flat
from sdar_verl.checks.panel_tasks import panel_files, panel_tasks, read_rows
from sdar_verl.checks.several_teachers import several_teachers_faults
from sdar_verl.checks.skills import PROBED_TASKS as SKILL_TASKS
from sdar_verl.checks.skills import retrieve_for_run, spread
from sdar_verl.config import SdarConfig
from sdar_verl.config.context import ContextConfig, ContrastConfig
from sdar_verl.context.base import ContextRequest, Passage, PlayedEpisode, PlayedTurn
from sdar_verl.context.builder import chosen_source, is_late, late_options
from sdar_verl.context.registry import Context, ContextError, check_contexts, get_context
from sdar_verl.context.writing import written_passages
from sdar_verl.envs.base import Task
from sdar_verl.errors import SdarError
from sdar_verl.panels import PanelError
from sdar_verl.recipe import env_of, plays_environments
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.loading import load_run_bank
from sdar_verl.skills.registry import get_rule
from sdar_verl.skills.retrieval import render_skills
from sdar_verl.teacher.sources import get_source, list_sources

_LOOP = "actor_rollout_ref.rollout.agent.default_agent_loop"
PROBED_TASKS = 8
"""Training tasks whose contexts are made once before the start."""


def context_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Faults of the ``sdar.context`` node, one text each; unknown names and options are found elsewhere."""
    context, source = sdar.context, sdar.teacher.source
    try:
        check_contexts(context.sources, context.options)
        late, by_turn = is_late(context), [name for name in context.named if get_context(name).by_turn]
    except ContextError:
        return []
    skills_shown = {
        "sdar.context.student": context.student == "skills",
        "sdar.context.sources": source != "none" and "skills" in context.named,
        **{
            f"sdar.validation.arms.{name}.context": arm.context == "skills"
            for name, arm in sdar.validation.arms.items()
        },
    }
    faults = []
    if sdar.skills.retrieval == ["none"]:
        faults += [
            f"sdar.skills.retrieval=[none] leaves {option} without skills to show; choose a rule, or another context"
            + (
                " (a run without a teacher: sdar.teacher.source=none and sdar.loss.coef=0)"
                if "sources" in option
                else ""
            )
            for option, shown in skills_shown.items()
            if shown
        ]
    for name, arm in sdar.validation.arms.items():
        if arm.context == "teacher" and late:
            faults.append(
                f"sdar.validation.arms.{name}.context=teacher cannot be shown with {late_options(context)}: what the "
                "teacher sees is known only when a training group has ended; use context=none"
            )
    if source == "none":
        idle = {
            f"sdar.context.control={context.control}": context.control != "none",
            f"sdar.context.on_empty={context.on_empty}": context.on_empty != "mask",
            f"sdar.context.contrast.sources={context.contrast.sources}": bool(context.contrast.sources),
            f"sdar.context.teachers.weights={context.teachers.weights}": bool(context.teachers.weights),
            f"sdar.context.teachers.by={context.teachers.by}": context.teachers.by is not None,
            f"sdar.context.episodes={context.episodes}": context.episodes != "all",
            f"sdar.context.turns_share={context.turns_share}": context.turns_share is not None,
        }
        shown = any(arm.context == "teacher" for arm in sdar.validation.arms.values())
        return faults + [
            f"{option} has no effect with sdar.teacher.source=none and no validation arm with context=teacher; "
            "leave it out"
            for option, changed in idle.items()
            if changed and not shown
        ]
    same = context.student == "skills" and context.sources == ["skills"] and context.control == "none"
    if same and source in list_sources() and get_source(source).equals_student == "always":
        faults.append(
            "sdar.context.student=skills shows the student what the teacher sees (sdar.context.sources=[skills]), and "
            f"sdar.teacher.source={source} has the student's weights: the gap is 0 on every token. Use "
            "sdar.teacher.source=none with sdar.loss.coef=0 (Skill-GRPO), or give the teacher more, e.g. "
            "sdar.context.sources=[skills,demonstration]"
        )
    if context.on_empty == "error" and late:
        faults.append(
            f"sdar.context.on_empty=error has no effect with {late_options(context)}: such a context may come to exist "
            "when the group has ended, and rows without one are left out and counted in sdar/context_missing_share; "
            "set it to mask"
        )
    faults += several_teachers_faults(config, sdar)
    faults += _contrast(context)
    if context.contrast.sources and sdar.teacher.on_long_prompt == "drop_history":
        faults.append(
            f"sdar.context.contrast.sources={context.contrast.sources} compares two prompts that differ in the context "
            "alone, but sdar.teacher.on_long_prompt=drop_history may drop more history from one than from the other; "
            "use error or mask"
        )
    if not plays_environments(config):
        faults += _turns_of_recipe(config, by_turn)
    elif by_turn and sdar.rollout.rows == "trajectory":
        faults.append(
            f"sdar.context: {', '.join(by_turn)} differ by turn, but with sdar.rollout.rows=trajectory the context "
            "stands once, in the first turn of the conversation; use rows=per_turn, or contexts of the whole episode"
        )
    faults += _share_of_turns(config, sdar)
    for node, slot in (("sdar.context", context), ("sdar.context.contrast", context.contrast)):
        if slot.control == "wrong":
            faults += _other_types(config, f"{node}.control=wrong")
    if not faults:
        faults += _probe(config, sdar)
    if not faults and context.on_empty == "error":
        faults += _without_context(config, sdar)
    return faults


def _loops(config: DictConfig) -> set[str]:
    """What plays the training rows of a recipe of verl's; empty where that is not known, as of remote files."""
    loop, loops = OmegaConf.select(config, _LOOP), set[str]()
    with suppress(PanelError):  # told by the checks of the data
        loops |= {
            row.get("agent_name") or loop for file in panel_files(config, "train_files") for row in read_rows(file)
        }
    return loops


def _share_of_turns(config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    """Turns can be left out where each is a row."""
    share = sdar.context.turns_share
    if share is None:
        return
    told = f"sdar.context.turns_share={share} leaves out turns of an episode, each a row of its own, but "
    if plays_environments(config):
        if sdar.rollout.rows == "trajectory":
            yield f"{told}with sdar.rollout.rows=trajectory an episode is one row; use rows=per_turn, or set it to null"
    elif (loops := _loops(config)) and loops <= {"single_turn_agent", "tool_agent"}:
        yield f"{told}a row of {' and '.join(sorted(loops))} is a whole conversation; set it to null"


def _turns_of_recipe(config: DictConfig, by_turn: list[str]) -> Iterator[str]:
    """Of verl's own loops; one of somebody's may make a row of each turn, which is looked at then."""
    loops = _loops(config) if by_turn else set()
    if "tool_agent" in loops:
        yield (
            f"sdar.context: {', '.join(by_turn)} differ by turn, but a row of tool_agent is a whole conversation with "
            "the context in its prompt; use contexts of the whole episode"
        )
    if "next_observation" in by_turn and loops == {"single_turn_agent"}:
        yield (
            "sdar.context: next_observation has nothing to show with single_turn_agent, whose only answer is followed "
            "by nothing; use feedback or another context"
        )


def _contrast(context: ContextConfig) -> list[str]:
    bad, node = context.contrast, "sdar.context.contrast"
    if not bad.sources:
        unread = {f"{node}.options={bad.options}": bool(bad.options), f"{node}.texts={bad.texts}": bad.texts > 1}
        unread[f"{node}.control={bad.control}"] = bad.control != "none"
        return [
            f"{option} has no effect with {node}.sources=[]; name the bad context there, or leave it out"
            for option, is_set in unread.items()
            if is_set
        ]
    if context.control == bad.control == "empty":
        return [
            f"sdar.context.control=empty and {node}.control=empty show the teacher nothing in either place: the gap "
            "between them is 0 on every token; leave one of them at none"
        ]
    same = (bad.sources, bad.options, bad.control) == (context.sources, context.options, context.control)
    if same and not context.teachers.several:
        return [
            f"{node}.sources={bad.sources} is what sdar.context.sources shows, too: the gap between them is 0 on every "
            f"token; use another context, or {node}.control=shuffled"
        ]
    return []


def _other_types(config: DictConfig, option: str) -> list[str]:
    types = {task.task_type for task in panel_tasks(config, "train_files")}
    if len(types) == 1 and plays_environments(config):
        return [
            f"{option} shows the context of a task of another type, but all tasks of data.train_files "
            f"are of the type {types.pop()!r}; use control=shuffled or random_text"
        ]
    if config.data.train_batch_size < 2:
        return [f"{option} takes another task of the same step: data.train_batch_size must be above 1"]
    return []


def _probe(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Make the early contexts of a few tasks in both slots, but for the skills, which have checks of their own; of
    validation data as well, where an arm shows them."""
    shown = any(arm.context == "teacher" for arm in sdar.validation.arms.values())
    context, contrast = sdar.context, sdar.context.contrast
    probe = partial(_probe_slot, config, context.seed)
    panels = ["train_files", *(["val_files"] * shown)]
    return probe("sdar.context", context, partial(_shown, context), panels) or probe(
        "sdar.context.contrast", contrast, lambda task: contrast.sources, ["train_files"]
    )


def _probe_slot(
    config: DictConfig,
    seed: int,
    node: str,
    slot: ContextConfig | ContrastConfig,
    shown: Callable[[Task], Sequence[str]],
    panels: Sequence[str],
) -> list[str]:
    contexts = [get_context(name) for name in slot.sources if name != "skills"]
    names = [context.name for context in contexts if not context.late]
    for option, name in product(panels if names else (), names):
        tasks = [task for task in panel_tasks(config, option) if name in shown(task)]
        # An environment's may take long to make; of a recipe's data, few rows may have one.
        tasks = tasks[:PROBED_TASKS] if plays_environments(config) else tasks
        found = False
        for number, task in enumerate(tasks):
            if found and number >= PROBED_TASKS:
                break
            request = ContextRequest(task, seed=seed, skills=lambda: Passage(""))
            try:
                found |= bool(get_context(name).make(request, slot.options.get(name, {})).text)
            except ContextError as error:
                return [f"{node}.sources: {error}"]
        if tasks and not found:
            return [
                f"{node}.sources: context {name!r} has nothing to show for the first {len(tasks)} tasks of "
                f"data.{option} (environment {tasks[0].env!r}){_set(node, slot, name)}; their data are "
                f"{', '.join(sorted(flat(tasks[0].data))) or 'empty'}. Use {_other(node, name)}another context"
            ]
    late = [context for context in contexts if context.late]
    tasks = panel_tasks(config, "train_files")[:1] if late else []
    for context, task in product(late, tasks):
        try:
            _try_late(context, task, seed, slot.options.get(context.name, {}))
        except ContextError as error:
            # What it cannot read of invented observations is its own matter; these are mistakes with real ones, too.
            if isinstance(error.__cause__, AttributeError | TypeError | NameError):
                return [f"{node}.sources: {error}; tried on an invented group of two episodes"]
    return []


def _try_late(context: Context, task: Task, seed: int, options: Mapping[str, Any]) -> None:
    """Make it for both episodes of an invented group; there need not be one. ContextError when the function fails."""
    turns = tuple(PlayedTurn(f"This is place {number}.", f"go to place {number + 1}", True) for number in range(2))
    solved = PlayedEpisode("0", turns, success=True, reward=1.0, last_observation="You are there.")
    failed = PlayedEpisode("1", (turns[0], PlayedTurn("Nothing happens.", None, False)), False, 0.0, "")
    for own, sibling in ((failed, solved), (solved, failed)):
        request = ContextRequest(task, seed, episode=own, siblings=(sibling,))
        if context.writes:
            written_passages(
                {own.name: (context, request, options)}, lambda prompts: [None] * len(prompts), lambda _: None
            )
        else:
            context.make(request, options)


def _set(node: str, slot: ContextConfig | ContrastConfig, name: str) -> str:
    given = slot.options.get(name, {})
    return "".join(f", with {node}.options.{name}.{option}={value}" for option, value in given.items())


def _other(node: str, name: str) -> str:
    parameters = signature(get_context(name).function).parameters.values()
    return f"other {node}.options.{name}, or " if any(p.kind is p.KEYWORD_ONLY for p in parameters) else ""


def _without_context(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Tasks for which the sources find nothing, among those that can be looked at in a moment."""
    sources, options = sdar.context.sources, sdar.context.options
    # Contexts of the environment may take long to make; skills are a look into the bank.
    tasks = spread(panel_tasks(config, "train_files"), SKILL_TASKS if sources == ["skills"] else PROBED_TASKS)
    try:
        bank = load_run_bank(sdar.skills, env_of(config, sdar)) if "skills" in sources else None
        if any(get_rule(name).learns for name in sdar.skills.retrieval):
            return []  # what it finds depends on what it has learned
        without = []
        for task in tasks:
            request = ContextRequest(task, seed=sdar.context.seed, skills=partial(_skills, bank, task, sdar))
            shown = _shown(sdar.context, task)
            if not any(get_context(name).make(request, options.get(name, {})).text for name in shown):
                without.append(task.task_id)
    except (SdarError, ValueError, ImportError, OSError):
        return []  # told by the checks of the skills
    if not without:
        return []
    named = ", ".join(without[:4]) + (", ..." if len(without) > 4 else "")
    return [
        f"sdar.context.on_empty=error: sdar.context.sources={sources} find nothing for {len(without)} of {len(tasks)} "
        f"tasks of data.train_files: {named}. Give them a context (a general skill in the bank, say), or leave their "
        "rows out of the distillation term with sdar.context.on_empty=mask"
    ]


def _shown(context: ContextConfig, task: Task) -> list[str]:
    """The sources that the teacher of a task's rows sees."""
    return context.sources if context.teachers.by is None else [chosen_source(context.teachers, task)]


def _skills(bank: SkillBank | None, task: Task, sdar: SdarConfig) -> Passage:
    return Passage(render_skills(retrieve_for_run(bank, task, sdar).skills) if bank is not None else "")
