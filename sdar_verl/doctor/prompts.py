"""How long a run's prompts get and what its skills do on its panel, by its own templates and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from sdar_verl.checks.panel_tasks import panel_tasks
from sdar_verl.checks.skills import spread
from sdar_verl.config import SdarConfig
from sdar_verl.doctor.findings import Finding, about_late
from sdar_verl.doctor.recipe_prompts import check_recipe_prompts
from sdar_verl.envs.base import NO_ACTION, Task
from sdar_verl.envs.host import EnvHost, EnvRaised
from sdar_verl.recipe import plays_environments
from sdar_verl.rollout.control import role_marks_of
from sdar_verl.rollout.prompt_builder import TurnView
from sdar_verl.rollout.runtime import Runtime

MAX_TASKS = 1000
"""Tasks of a panel whose contexts are made and counted."""


@dataclass(frozen=True)
class _Contexts:
    """What the teacher is shown, over the panel.

    Attributes:
        tasks: how many were looked at.
        longest: tokens of the longest context, and its task.
        without: tasks without any context.
        unmatched: tasks for which no skill of their own was found.
        dropped: tasks whose skills did not all fit ``sdar.skills.max_tokens``.
    """

    tasks: int
    longest: tuple[int, str]
    without: int
    unmatched: int
    dropped: int


def check_prompts(config: DictConfig, sdar: SdarConfig, resets: int) -> Iterator[Finding]:
    """Lengths of student's and teacher's prompts, and how the skills fit the panel.

    Args:
        config: verl's whole config.
        sdar: its ``sdar`` node.
        resets: tasks whose environment is reset, to see their first prompt.
    """
    tasks = panel_tasks(config, "train_files")
    if not tasks:
        return  # told by the checks of the data
    from sdar_verl.verl.recipe_prompts import policy_tokenizer

    try:
        tokenizer = policy_tokenizer(config)
    except Exception as error:  # transformers raises many kinds
        first = (str(error).splitlines() or [""])[0]
        yield Finding("warn", "prompts", f"not checked: the model's tokenizer cannot be read here ({first})",
                      "download the model, and name its folder: actor_rollout_ref.model.path=...")  # fmt: skip
        return
    yield _white_space(tokenizer)
    if not plays_environments(config):
        yield _roles(config, tokenizer)
        yield from check_recipe_prompts(config, sdar, tokenizer)
        return
    try:
        runtime = Runtime(config, tokenizer)
    except Exception as error:  # a template, a bank, a context: named by the run's own checks
        yield Finding("fail", "prompts", f"not checked: {type(error).__name__}: {error}")
        return
    yield _roles(config, tokenizer)
    longest_context = 0
    if sdar.teacher.source != "none" and not runtime.contexts.late:
        try:
            found = _contexts(runtime, spread(tasks, MAX_TASKS))
        except Exception as error:  # whatever a third party's rule or context raises
            yield Finding("fail", "context", f"{type(error).__name__}: {error}")
            return
        longest_context = found.longest[0]
        yield from _about_contexts(found, sdar, runtime.bank.notes)
        yield from _bound(config, sdar, found)
    elif sdar.teacher.source != "none":
        yield Finding("ok", "context", about_late(sdar.context))
    if resets:
        yield from _first_prompts(runtime, sdar, spread(tasks, resets), with_teacher=longest_context > 0)


def _white_space(tokenizer: Any) -> Finding:
    """Whether the model sees lines and words apart."""
    text = "one two\n\nthree"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids) == text:
        return Finding("ok", "tokenizer", "keeps spaces and line breaks")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokenizer("onetwo\nthree")["input_ids"]:
        return Finding("ok", "tokenizer", "reads single words, apart by white space of any kind")
    return Finding(
        "warn",
        "tokenizer",
        f"reads {text!r} as {tokenizer.decode(ids)!r}",
        "if the model's folder has no config.json, add it: by its model_type transformers chooses the tokenizer",
    )


def _roles(config: DictConfig, tokenizer: Any) -> Finding:
    """Whether texts can be kept from imitating a turn (docs/security.md)."""
    marks = role_marks_of(tokenizer, config.data.get("apply_chat_template_kwargs", {}))
    if marks:
        return Finding("ok", "roles", f"no text from outside can write {', '.join(marks)}")
    return Finding(
        "warn",
        "roles",
        "the chat template marks roles by plain words only, so that an observation can imitate a turn",
        "use a model whose chat template has marks such as <|im_start|>, or environments that you trust",
    )


def _contexts(runtime: Runtime, tasks: Sequence[Task]) -> _Contexts:
    lengths, without, unmatched, dropped = [(0, "")], 0, 0, 0
    for task in tasks:
        request = runtime.request(task)
        passage = runtime.contexts.passage(request, runtime.contexts.early_passages(request))
        lengths.append((runtime.contexts.count_tokens(passage.text), task.task_id))
        without += not passage.text
        unmatched += passage.no_match
        dropped += passage.dropped > 0
    return _Contexts(len(tasks), max(lengths), without, unmatched, dropped)


def _about_contexts(found: _Contexts, sdar: SdarConfig, notes: Sequence[str]) -> Iterator[Finding]:
    tokens, task = found.longest
    if found.without:
        yield Finding(
            "fail" if found.without == found.tasks else "warn",
            "context",
            f"{_share(found.without, found.tasks)} have no context at all: the teacher has no say on them",
            "choose other rules (sdar.skills.retrieval) or sources (sdar.context.sources), or add a general skill",
        )
    else:
        yield Finding("ok", "context", f"every task has one; the longest has {tokens} tokens ({task})")
    if "skills" not in sdar.context.sources:
        return
    if found.unmatched:
        yield Finding(
            "warn",
            "skills",
            f"{_share(found.unmatched, found.tasks)} find no skill of their own, at most general ones",
            "look at one with `sdar-verl skills match`, and add task types or keywords to the bank",
        )
    else:
        yield Finding("ok", "skills", f"bank {sdar.skills.bank}: every task finds a skill of its own")
    if notes:
        yield Finding("ok", "skills", f"bank {sdar.skills.bank}: {'; '.join(notes)}")
    if found.dropped:
        yield Finding(
            "warn",
            "skills",
            f"{_share(found.dropped, found.tasks)} find more skills than fit sdar.skills.max_tokens="
            f"{sdar.skills.max_tokens}; the last ones are left out",
            "raise sdar.skills.max_tokens",
        )


def _bound(config: DictConfig, sdar: SdarConfig, found: _Contexts) -> Iterator[Finding]:
    """A student's prompt never exceeds its limit, so the teacher's never exceeds that and the context."""
    most = config.data.max_prompt_length + found.longest[0]
    limit = sdar.teacher.max_prompt_length
    text = (
        f"data.max_prompt_length={config.data.max_prompt_length} + longest context {found.longest[0]} = {most} tokens"
    )
    if most <= limit:
        yield Finding("ok", "teacher's limit", f"{text}, within sdar.teacher.max_prompt_length={limit}")
    else:
        what = {"error": "stops the run", "drop_history": "loses history, or stops the run", "mask": "loses its row"}
        yield Finding(
            "warn",
            "teacher's limit",
            f"{text}: a long turn may exceed sdar.teacher.max_prompt_length={limit} and then "
            f"{what[sdar.teacher.on_long_prompt]} (sdar.teacher.on_long_prompt={sdar.teacher.on_long_prompt})",
            f"raise sdar.teacher.max_prompt_length to {most}, or set sdar.skills.max_tokens",
        )


def _first_prompts(
    runtime: Runtime, sdar: SdarConfig, tasks: Sequence[Task], *, with_teacher: bool
) -> Iterator[Finding]:
    student: list[tuple[int, str]] = []
    teacher: list[tuple[int, str]] = []
    started, method = "none yet", "reset"
    host = EnvHost(sdar.env.name, sdar.env.options, sdar.modules)
    try:
        for task in tasks:
            started, method = task.task_id, "reset"
            state = host.reset(0, task).step
            shown = TurnView(
                task=task.description,
                history=(),
                observation=state.observation,
                admissible_actions=(*state.action_forms, *state.admissible_actions),
                step=1,
                max_steps=sdar.env.max_steps,
            )
            student.append((len(runtime.prompts.encode(shown, "", ())), task.task_id))
            if with_teacher:
                request = runtime.request(task)
                text = runtime.contexts.passage(request, runtime.contexts.early_passages(request)).text
                teacher.append((len(runtime.prompts.encode(shown, text, ())), task.task_id))
            method = "step"  # with what an answer without an action sends
            host.step(0, NO_ACTION)
    except Exception as error:  # an engine raises what it likes
        told = error.text if isinstance(error, EnvRaised) else f"{type(error).__name__}: {error}"
        yield Finding("fail", "environment", f"{sdar.env.name} fails in a {method} of task {started}: {told}")
        return
    finally:
        host.close()
    yield Finding("ok", "environment", f"{len(tasks)} tasks of {sdar.env.name} were started, and answered a step")
    limits = [("student", student, "data.max_prompt_length", runtime.max_prompt_length)]
    if teacher:
        limits.append(("teacher", teacher, "sdar.teacher.max_prompt_length", sdar.teacher.max_prompt_length))
    for who, lengths, option, limit in limits:
        longest, where = max(lengths)
        long = sum(length > limit for length, _ in lengths)
        text = f"first turn of {len(lengths)} tasks: up to {longest} of {limit} tokens"
        if long:
            yield Finding(
                "fail",
                f"{who}'s prompt",
                f"{text}: {long} are longer than {option}, e.g. {where}",
                f"raise {option} to well above {longest}",
            )
        elif longest > 0.8 * limit:
            yield Finding("warn", f"{who}'s prompt", f"{text}; later turns add history", f"raise {option}")
        else:
            yield Finding("ok", f"{who}'s prompt", text)


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} tasks ({part / whole:.0%})"
