"""The teacher's prompt of one row; made in the agent loop, or by the trainer where a context is late."""

from __future__ import annotations

from sdar_verl.config import TeacherConfig
from sdar_verl.context.base import Passage
from sdar_verl.rollout.prompt_builder import PromptBuilder, PromptTooLong, TurnView
from sdar_verl.rollout.rows import RowInfo


def add_teacher_prompt(
    info: RowInfo, prompts: PromptBuilder, shown: TurnView, passage: Passage, settings: TeacherConfig
) -> None:
    """Fill in the teacher's prompt and what belongs to it.

    Args:
        info: the row's record; ``prompt_tokens`` must be set.
        prompts: of the run.
        shown: what the student was shown, history and all: the teacher answers the student's question.
        passage: the context; an empty text gives the student's own prompt.
        settings: the ``sdar.teacher`` node; its limit is the teacher's own.
    """
    try:
        ids, dropped = prompts.fit(
            shown,
            passage.text,
            limit=settings.max_prompt_length,
            drop_history=settings.on_long_prompt == "drop_history",
            option="sdar.teacher.max_prompt_length",
        )
    except PromptTooLong as error:
        info.truncated = True
        if settings.on_long_prompt != "mask":
            # The trainer stops the run with this text: raising here would only cost the group.
            skills = f" with skills {', '.join(passage.skills)}" if passage.skills else ""
            info.error = (
                f"teacher prompt{skills}: {error}; or choose what happens then: "
                "sdar.teacher.on_long_prompt=drop_history or mask"
            )
        return
    info.truncated = dropped > 0
    info.take_teacher_prompt(ids)
