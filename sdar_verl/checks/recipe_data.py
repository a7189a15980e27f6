"""Checks of a recipe's own data, of what its rows and options name, and of its first prompts, before Ray starts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from sdar_verl.checks.data import step_faults
from sdar_verl.checks.panel_tasks import panel_files, read_rows, row_count
from sdar_verl.config import SdarConfig
from sdar_verl.errors import SdarError
from sdar_verl.panels import PanelError
from sdar_verl.recipe import AGENT_LOOP, TAUGHT
from sdar_verl.rollout.messages import MessagesError, holder
from sdar_verl.rollout.prompts import PromptTemplateError
from sdar_verl.rollout.recipe_rows import task_of
from sdar_verl.untrusted import shorten

ROWS_MADE = 200
"""Rows of the training files whose prompts are made before the start."""
_GRADED_LOOPS = ("single_turn_agent", "tool_agent")
"""verl's loops, which leave the reward to the reward manager."""


def recipe_data_faults(config: DictConfig, sdar: SdarConfig) -> list[str]:
    """Every fault, one text each; the later checks need what the earlier ones look at."""
    for look in (_names, _files, _prompts):
        faults = list(look(config, sdar))
        if faults:
            return faults
    return []


# -------------------------------------------------------------------- rows


def _files(config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    train, whole, loops = 0, True, _known_loops(config)
    for option in ("train_files", "val_files"):
        if not config.data[option]:
            yield f"data.{option} is not set; give the Parquet files of your recipe"
            continue
        for file in panel_files(config, option):
            if not Path(file).is_file():
                yield f"data.{option}={file} does not exist; give the Parquet files of your recipe, by an absolute path"
                continue
            try:
                fault = _of_rows(config, sdar, loops, f"data.{option}={file}", file)
                train += row_count(file) if option == "train_files" else 0
            except PanelError as error:
                fault = f"data.{option}: {error}"
            if fault:
                whole = False
                yield fault
    if whole and train:
        yield from step_faults(config, train)


def _of_rows(config: DictConfig, sdar: SdarConfig, loops: set[str] | None, said: str, file: str) -> str | None:
    """The first fault of a file's rows, as far as they are looked at."""
    number = -1
    for number, row in enumerate(read_rows(file)):
        fault = _of_row(config, sdar, row) or _of_loop(row.get("agent_name"), loops, "agent_name")
        if fault:
            return f"{said}: row {number}: {fault}"
    return f"{said} holds no row" if number < 0 else None


def _of_row(config: DictConfig, sdar: SdarConfig, row: Mapping[str, Any]) -> str | None:
    key, loop = config.data.get("prompt_key", "prompt"), config.actor_rollout_ref.rollout.agent.default_agent_loop
    if key not in row:
        return f"there is no column {key!r} (data.prompt_key); it has {', '.join(sorted(row))}"
    messages = row[key]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        held = type(messages).__name__ if not isinstance(messages, list) else shorten(messages)
        return (
            f"the column {key!r} holds {held}, not a list of messages with role and content, as verl's agent loops "
            "read it"
        )
    graded = (row.get("agent_name") or loop) in _GRADED_LOOPS
    kinds = [
        config.data.get(name) or name.removesuffix("_key") + "s" for name in ("image_key", "video_key", "audio_key")
    ]
    if graded and (shown := [kind for kind in kinds if row.get(kind)]):
        return f"the column {shown[0]!r} has something to look at or to listen to; rows of SDAR's trainers are text"
    if sdar.teacher.source != "none":
        try:
            holder(messages, sdar.context.place)
        except MessagesError as error:
            return str(error)
    if graded and OmegaConf.select(config, "reward.reward_manager.name") == "naive":
        lacking = [column for column in ("data_source", "reward_model") if row.get(column) is None]
        if lacking:
            return (
                f"there is no {' and no '.join(lacking)}, which verl's reward manager reads "
                "(reward.reward_manager.name=naive); add it to the data, or choose a manager that does without"
            )
    return None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


# -------------------------------------------------------------------- what is named


def _names(config: DictConfig, _: SdarConfig) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    paths = {
        "actor_rollout_ref.rollout.agent.agent_loop_config_path": rollout.agent.get("agent_loop_config_path"),
        "actor_rollout_ref.rollout.multi_turn.tool_config_path": rollout.multi_turn.get("tool_config_path"),
        "actor_rollout_ref.rollout.multi_turn.function_tool_path": rollout.multi_turn.get("function_tool_path"),
        "reward.custom_reward_function.path": OmegaConf.select(config, "reward.custom_reward_function.path"),
    }
    missing = {option: path for option, path in paths.items() if path and "://" not in path and not _exists(path)}
    yield from (f"{option}={path} does not exist" for option, path in missing.items())
    if missing:
        return
    name = OmegaConf.select(config, "reward.custom_reward_function.name")
    file = paths["reward.custom_reward_function.path"]
    if file and name and "://" not in file and not _defines(file, name):
        yield f"reward.custom_reward_function.name={name}: {file} defines no such function"
    faults = list(_classes(paths))
    yield from faults
    if faults:
        return
    said = "actor_rollout_ref.rollout.agent.default_agent_loop"
    if fault := _of_loop(rollout.agent.default_agent_loop, _known_loops(config), said):
        yield fault


def _classes(paths: Mapping[str, str | None]) -> Iterator[str]:
    """Classes that verl's workers make by their names in files: of tools, and of agent loops."""
    from sdar_verl.verl.recipe_prompts import config_file

    for option, read in _CLASSES.items():
        if not (path := paths[option]) or "://" in path:
            continue
        try:
            names = read(OmegaConf.load(config_file(path)))
        except Exception as error:  # YAML, OmegaConf, a list where a mapping is wanted
            yield f"{option}={path} cannot be read ({type(error).__name__}: {shorten(str(error))})"
            continue
        for name in names:
            try:
                get_object(name)
            except Exception as error:  # whatever a module does when it is imported
                yield f"{option}={path}: {name} cannot be imported ({shorten(str(error))}); is PYTHONPATH set?"


_CLASSES = {
    "actor_rollout_ref.rollout.multi_turn.tool_config_path": lambda file: [tool.class_name for tool in file.tools],
    "actor_rollout_ref.rollout.agent.agent_loop_config_path": lambda file: [loop["_target_"] for loop in file],
}


def _exists(path: str) -> bool:
    from sdar_verl.verl.recipe_prompts import config_file

    with suppress(OSError, ValueError):  # verl's, of a path that it finds nowhere
        return Path(config_file(path)).is_file()
    return False


def _defines(file: str, name: str) -> bool:
    """Whether a module may hold ``name``: the word stands in it, or it takes all there is from another."""
    text = Path(file).read_text("utf-8", "replace")
    return re.search(rf"\b{re.escape(name)}\b|import \*", text) is not None


def _known_loops(config: DictConfig) -> set[str] | None:
    """Agent loops that a run may name; None where a model's library registers others, in processes that load it."""
    if config.actor_rollout_ref.model.get("external_lib"):
        return None
    from sdar_verl.verl.recipe_prompts import loop_names

    return loop_names(config) - {AGENT_LOOP, TAUGHT}


def _of_loop(loop: str | None, known: set[str] | None, said: str) -> str | None:
    if not loop or known is None or loop in known:
        return None
    return (
        f"{said}={loop} is no agent loop that is registered here; known: {', '.join(sorted(known))}. One of your own: "
        "name its module in sdar.modules, or agent_loop_config_path"
    )


# -------------------------------------------------------------------- prompts


def _prompts(config: DictConfig, sdar: SdarConfig) -> Iterator[str]:
    """The first fault of a prompt, the student's or the teacher's, among the first rows; of a model that lies here. The
    doctor makes them all."""
    model, data = config.actor_rollout_ref.model, config.data
    paths = [model.path, model.get("tokenizer_path"), model.get("hf_config_path")]
    if not all(Path(str(path)).is_dir() for path in paths if path):
        return
    files, loop = panel_files(config, "train_files"), config.actor_rollout_ref.rollout.agent.default_agent_loop
    from sdar_verl.verl.recipe_prompts import RecipeRuntime, model_type, policy_tokenizer, prompt_maker

    taught = sdar.teacher.source != "none"
    try:
        tokenizer = policy_tokenizer(config)
        make, runtime = prompt_maker(config, tokenizer, model_type(config)), None
        if taught and "skills" not in sdar.context.named:  # a bank has checks of its own
            with suppress(SdarError, PromptTemplateError):  # told by the checks of contexts and place
                runtime = RecipeRuntime(config, tokenizer, model_type(config))
    except Exception as error:  # transformers and verl raise many kinds
        path = model.get("tokenizer_path") or model.path
        yield f"actor_rollout_ref.model: the tokenizer of {path} cannot be used ({_of(error)}); use another one"
        return
    for file in files:
        for number, row in enumerate(read_rows(file, max(1, ROWS_MADE // len(files)))):
            said, messages = f"row {number} of data.train_files={file}", row[data.get("prompt_key", "prompt")]
            try:
                tokens = len(make([dict(message) for message in messages]))
            except Exception as error:  # and a chat template
                yield (
                    f"actor_rollout_ref.model.path={model.path}: verl's agent loops cannot make the prompt of {said} "
                    f"with its tokenizer ({_of(error)}); use a model whose tokenizer has a chat template for these "
                    "messages"
                )
                return
            if tokens > data.max_prompt_length:
                stops = number == 0 or (taught and sdar.context.on_foreign_prompt == "error")
                if stops and not data.get("filter_overlong_prompts", False):
                    yield (
                        f"data.max_prompt_length={data.max_prompt_length}, but the prompt of {said} has {tokens} "
                        "tokens; raise it, or set data.filter_overlong_prompts=True"
                    )
                    return
            elif runtime is not None and (row.get("agent_name") or loop) in _GRADED_LOOPS:
                if runtime.contexts.late and number:
                    continue  # whether it gets a context is not known
                if fault := _of_teacher(sdar, runtime, said, row, messages, tokens):
                    yield fault
                    return


def _of_teacher(
    sdar: SdarConfig, runtime: Any, said: str, row: Mapping[str, Any], messages: Any, tokens: int
) -> str | None:
    limit, context = sdar.teacher.max_prompt_length, "without a context"
    try:
        if not runtime.contexts.late:
            passage = runtime.early(task_of({**row, "raw_prompt": messages}))
            if passage is None:
                return None
            plain = [dict(message) for message in messages]
            tokens, context = len(runtime.prompts.teacher(plain, None, passage.text)), "with its context"
    except Exception as error:  # whatever a context of somebody's raises
        return f"{said}: the teacher's prompt cannot be made ({_of(error)})"
    if tokens <= limit or sdar.teacher.on_long_prompt != "error":
        return None
    return (
        f"sdar.teacher.max_prompt_length={limit}, but the prompt of {said} has {tokens} tokens {context}; raise it, or "
        "set sdar.teacher.on_long_prompt=mask"
    )


def _of(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten(str(error))}"
