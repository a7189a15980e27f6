"""How long the prompts of a recipe of verl's are on its own training rows, and how many have a context."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sdar_verl.checks.panel_tasks import panel_files, read_rows
from sdar_verl.config import SdarConfig
from sdar_verl.errors import SdarError
from sdar_verl.rollout.recipe_rows import task_of

MAX_ROWS = 10_000
"""Rows of the training files whose prompts are made."""


class PromptsUnknown(SdarError):
    """Prompts cannot be made here: a bank, a place, a file of tools, a chat template, a row."""


@dataclass
class Lengths:
    """Of one kind of prompt.

    Attributes:
        found: (tokens, row).
    """

    found: list[tuple[int, str]] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """In tokens; 0 without any."""
        return max(self.found, default=(0, ""))[0]

    def above(self, limit: int) -> list[str]:
        """The rows above it, the longest first."""
        return [row for length, row in sorted(self.found, reverse=True) if length > limit]


@dataclass
class PromptLengths:
    """Over the training rows.

    Attributes:
        late: the teacher's prompts are known when a group has ended: none was made.
        rows: that were looked at.
        student: their prompts.
        teacher: those of rows with a context.
        own: the student's prompts of the same rows.
    """

    late: bool
    rows: int = 0
    student: Lengths = field(default_factory=Lengths)
    teacher: Lengths = field(default_factory=Lengths)
    own: Lengths = field(default_factory=Lengths)

    def in_run(self, config: DictConfig, sdar: SdarConfig) -> tuple[list[int], list[int]]:
        """What the limits leave: tokens of the student's prompts, and what the context adds to those with a teacher.

        verl leaves prompts that are too long out (``data.filter_overlong_prompts``), or cuts them.
        """
        limit = config.data.max_prompt_length
        most = limit if config.data.get("filter_overlong_prompts", False) else math.inf
        both = zip(self.teacher.found, self.own.found, strict=True)
        return (
            [min(own, limit) for own, _ in self.student.found if own <= most],
            [
                length - own
                for (length, _), (own, _) in both
                if own <= limit and length <= sdar.teacher.max_prompt_length
            ],
        )

    @property
    def without(self) -> int:
        """Rows for which the sources find nothing."""
        return self.rows - len(self.teacher.found)


def prompt_lengths(config: DictConfig, sdar: SdarConfig, tokenizer: Any, most: int = MAX_ROWS) -> PromptLengths:
    """Make the prompts of the first ``most`` training rows.

    Args:
        config: verl's whole config.
        sdar: its ``sdar`` node.
        tokenizer: of the policy.
        most: rows.

    Raises:
        PromptsUnknown: with the row, where one is at fault.
    """
    from sdar_verl.verl.recipe_prompts import RecipeRuntime, model_type, tool_schemas

    try:
        runtime = RecipeRuntime(config, tokenizer, model_type(config))
        tools = tool_schemas(config)
    except Exception as error:  # whatever banks, places, tools and tokenizers of others raise
        raise PromptsUnknown(f"{type(error).__name__}: {error}") from error
    found = PromptLengths(runtime.contexts.late)
    key = config.data.get("prompt_key", "prompt")
    for where, columns in islice(_rows(config, most), most):
        found.rows += 1
        if key not in columns:
            known = ", ".join(sorted(columns))
            raise PromptsUnknown(f"{where}: there is no column {key!r} (data.prompt_key); it has {known}")
        try:
            row = {**columns, "raw_prompt": columns[key]}
            shown = _tools_of(row, tools, config)
            messages = [dict(message) for message in row["raw_prompt"]]
            own = (len(runtime.prompts.student(messages, shown)), where)
            found.student.found.append(own)
            if sdar.teacher.source == "none" or found.late:
                continue
            passage = runtime.early(task_of(row))
            if passage is not None:
                found.teacher.found.append((len(runtime.prompts.teacher(messages, shown, passage.text)), where))
                found.own.found.append(own)
        except Exception as error:  # a chat template, a context, a retrieval rule
            raise PromptsUnknown(f"{where}: {type(error).__name__}: {error}") from error
    return found


def _rows(config: DictConfig, most: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in panel_files(config, "train_files"):
        for index, row in enumerate(read_rows(file, most)):
            yield f"row {index} of {Path(file).name}", row


def _tools_of(row: Mapping[str, Any], tools: list[dict[str, Any]] | None, config: DictConfig) -> Any:
    """Schemas in the row's prompt: of ``tool_agent`` alone, and of a selection where the row names one."""
    if (row.get("agent_name") or config.actor_rollout_ref.rollout.agent.default_agent_loop) != "tool_agent":
        return None
    selected = (row.get("extra_info") or {}).get("tool_selection")
    if not selected or not tools:
        return tools
    return [tool for tool in tools if tool["function"]["name"] in selected]
