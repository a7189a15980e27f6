"""How long the prompts of a recipe of verl's get on its own data, and how many rows the teacher has a say on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sdar_verl.checks.panel_tasks import panel_files, read_rows
from sdar_verl.config import SdarConfig
from sdar_verl.doctor.findings import Finding, about_late
from sdar_verl.rollout.recipe_rows import task_of

MAX_ROWS = 10_000
"""Rows of the training files whose prompts are made."""


@dataclass
class _Lengths:
    """Of one kind of prompt: (tokens, row)."""

    found: list[tuple[int, str]] = field(default_factory=list)

    @property
    def longest(self) -> int:
        return max(self.found, default=(0, ""))[0]

    def above(self, limit: int) -> list[str]:
        """The rows above it, the longest first."""
        return [row for length, row in sorted(self.found, reverse=True) if length > limit]


def check_recipe_prompts(config: DictConfig, sdar: SdarConfig, tokenizer: Any) -> Iterator[Finding]:
    """Student's and teacher's prompts, and rows without a context, over the training files.

    Args:
        config: verl's whole config.
        sdar: its ``sdar`` node.
        tokenizer: of the policy.
    """
    from sdar_verl.verl.recipe_prompts import RecipeRuntime, model_type, tool_schemas

    try:
        runtime = RecipeRuntime(config, tokenizer, model_type(config))
        tools = tool_schemas(config)
    except Exception as error:  # a bank, a place, a file of tools, a tokenizer that verl cannot continue
        yield Finding("fail", "prompts", f"not checked: {type(error).__name__}: {error}")
        return
    early = sdar.teacher.source != "none" and not runtime.contexts.late
    student, teacher, rows, without = _Lengths(), _Lengths(), 0, 0
    for where, row in islice(_rows(config), MAX_ROWS):
        rows += 1
        try:
            shown = _tools_of(row, tools, config)
            messages = [dict(message) for message in row["raw_prompt"]]
            student.found.append((len(runtime.prompts.student(messages, shown)), where))
            if not early:
                continue
            passage = runtime.early(task_of(row))
            if passage is None:
                without += 1
            else:
                teacher.found.append((len(runtime.prompts.teacher(messages, shown, passage.text)), where))
        except Exception as error:  # a chat template, a context, a retrieval rule
            yield Finding("fail", "prompts", f"{where}: {type(error).__name__}: {error}")
            return
    yield _about_student(config, sdar, student)
    if sdar.teacher.source == "none":
        return
    if not early:
        yield _about_late(config, sdar, student)
        return
    yield _about_contexts(sdar, rows, without)
    if teacher.found:
        yield _about_teacher(sdar, teacher)


def _rows(config: DictConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    key = config.data.get("prompt_key", "prompt")
    for file in panel_files(config, "train_files"):
        for index, row in enumerate(read_rows(file, MAX_ROWS)):
            yield f"row {index} of {Path(file).name}", {**row, "raw_prompt": row[key]}


def _tools_of(row: Mapping[str, Any], tools: list[dict[str, Any]] | None, config: DictConfig) -> Any:
    """Schemas in the row's prompt: of ``tool_agent`` alone, and of a selection where the row names one."""
    if (row.get("agent_name") or config.actor_rollout_ref.rollout.agent.default_agent_loop) != "tool_agent":
        return None
    selected = (row.get("extra_info") or {}).get("tool_selection")
    if not selected or not tools:
        return tools
    return [tool for tool in tools if tool["function"]["name"] in selected]


def _about_student(config: DictConfig, sdar: SdarConfig, student: _Lengths) -> Finding:
    limit = config.data.max_prompt_length
    text = f"{len(student.found)} rows of data.train_files: up to {student.longest} of {limit} tokens"
    if not (above := student.above(limit)):
        return Finding("ok", "student's prompt", text)
    text = f"{text}; {_share(len(above), student)} are longer than data.max_prompt_length, the longest {above[0]}"
    if config.data.get("filter_overlong_prompts", False):
        return Finding("warn", "student's prompt", f"{text}: verl leaves them out", "raise data.max_prompt_length")
    stops = sdar.teacher.source != "none" and sdar.context.on_foreign_prompt == "error"
    return Finding(
        "fail" if stops else "warn",
        "student's prompt",
        f"{text}: verl cuts them" + (", and there is no teacher's prompt for a cut one" if stops else ""),
        f"raise data.max_prompt_length to {student.longest}, or set data.filter_overlong_prompts=True",
    )


def _about_contexts(sdar: SdarConfig, rows: int, without: int) -> Finding:
    sources = f"sdar.context.sources=[{','.join(sdar.context.sources)}]"
    share = f"{rows - without} of {rows} rows ({(rows - without) / max(rows, 1):.0%}) have a context"
    if not without:
        return Finding("ok", "context", share)
    return Finding(
        "fail" if without == rows or sdar.context.on_empty == "error" else "warn",
        "context",
        f"{share} by {sources}: the teacher has no say on the others",
        "name a column that all rows have, or add a source",
    )


def _about_teacher(sdar: SdarConfig, teacher: _Lengths) -> Finding:
    limit = sdar.teacher.max_prompt_length
    text = f"up to {teacher.longest} of {limit} tokens"
    if not (above := teacher.above(limit)):
        return Finding("ok", "teacher's prompt", text)
    masked = sdar.teacher.on_long_prompt == "mask"
    return Finding(
        "warn" if masked else "fail",
        "teacher's prompt",
        f"{text}; {_share(len(above), teacher)} are longer, the longest {above[0]}: "
        + ("these rows have no teacher" if masked else "the first of them stops the run")
        + f" (sdar.teacher.on_long_prompt={sdar.teacher.on_long_prompt})",
        f"raise sdar.teacher.max_prompt_length to {teacher.longest}"
        + ("" if masked else ", or set sdar.teacher.on_long_prompt=mask"),
    )


def _about_late(config: DictConfig, sdar: SdarConfig, student: _Lengths) -> Finding:
    """A context that is another rollout has at most a response's tokens."""
    text = about_late(sdar.context)
    most, limit = student.longest + config.data.max_response_length, sdar.teacher.max_prompt_length
    if not {"sibling", "failed_sibling"} & set(sdar.context.sources) or most <= limit:
        return Finding("ok", "context", text)
    return Finding(
        "warn",
        "teacher's prompt",
        f"{text}; the longest prompt and an answer of data.max_response_length={config.data.max_response_length} are "
        f"{most} tokens, above sdar.teacher.max_prompt_length={limit}",
        f"raise sdar.teacher.max_prompt_length to {most}, or set sdar.teacher.on_long_prompt=mask",
    )


def _share(part: int, whole: _Lengths) -> str:
    return f"{part} of {len(whole.found)} ({part / len(whole.found):.0%})"
