"""How long the prompts of a recipe of verl's get on its own data, and how many rows the teacher has a say on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig

from sdar_verl.checks.prompt_lengths import Lengths, PromptsUnknown, prompt_lengths
from sdar_verl.config import SdarConfig
from sdar_verl.doctor.findings import Finding, about_late


def check_recipe_prompts(config: DictConfig, sdar: SdarConfig, tokenizer: Any) -> Iterator[Finding]:
    """Student's and teacher's prompts, and rows without a context, over the training files.

    Args:
        config: verl's whole config.
        sdar: its ``sdar`` node.
        tokenizer: of the policy.
    """
    try:
        found = prompt_lengths(config, sdar, tokenizer)
    except PromptsUnknown as error:
        yield Finding("fail", "prompts", f"not checked: {error}")
        return
    yield _about_student(config, sdar, found.student)
    if sdar.teacher.source == "none":
        return
    if found.late:
        yield _about_late(config, sdar, found.student)
        return
    yield _about_contexts(sdar, found.rows, found.without)
    if found.teacher.found:
        yield _about_teacher(sdar, found.teacher)


def _about_student(config: DictConfig, sdar: SdarConfig, student: Lengths) -> Finding:
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


def _about_teacher(sdar: SdarConfig, teacher: Lengths) -> Finding:
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


def _about_late(config: DictConfig, sdar: SdarConfig, student: Lengths) -> Finding:
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


def _share(part: int, whole: Lengths) -> str:
    return f"{part} of {len(whole.found)} ({part / len(whole.found):.0%})"
