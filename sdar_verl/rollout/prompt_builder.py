"""Token ids of the student's and the teacher's prompt: one template, one chat template, each encoded exactly once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdar_verl.rollout.prompts import PromptTemplate


class PromptTooLong(ValueError):
    """The prompt does not fit its limit, even after what the chosen policy may drop."""


@dataclass(frozen=True)
class TurnContext:
    """What the agent knows before a turn.

    Attributes:
        task: description of the task.
        history: past (observation, action) pairs, oldest first; None where an answer held no action.
        observation: what the environment said last.
        admissible_actions: actions offered in the prompt.
        step: 1-based number of this turn.
        max_steps: turns the episode may have.
    """

    task: str
    history: tuple[tuple[str, str | None], ...]
    observation: str
    admissible_actions: tuple[str, ...]
    step: int
    max_steps: int


class PromptBuilder:
    """Renders a turn into token ids: one user message through the model's chat template.

    The student's prompt is the template with an empty skill slot, the teacher's the same template with the slot
    filled; nothing is decoded and encoded again, so both differ in the skill text only.
    """

    def __init__(self, tokenizer: Any, template: PromptTemplate, chat_template_kwargs: Mapping[str, Any] | None = None):
        self._tokenizer = tokenizer
        self._template = template
        self._chat_template_kwargs = dict(chat_template_kwargs or {})

    @property
    def action_tags(self) -> tuple[str, ...]:
        """Tags that the template asks the model to put its action in."""
        return self._template.action_tags

    def encode(self, context: TurnContext, skills: str, history: Sequence[tuple[str, str | None]]) -> list[int]:
        """Token ids of ``context`` with ``skills`` in the slot and this much ``history``."""
        text = self._template.render(
            task=context.task,
            skills=skills,
            history=[{"observation": observation, "action": action} for observation, action in history],
            observation=context.observation,
            admissible_actions=list(context.admissible_actions),
            step=context.step,
            max_steps=context.max_steps,
        )
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self._chat_template_kwargs,
        )

    def fit(
        self, context: TurnContext, skills: str, *, limit: int, drop_history: bool, option: str
    ) -> tuple[list[int], int]:
        """Encode ``context`` within ``limit`` tokens.

        Args:
            context: the turn.
            skills: text of the skill slot, empty for the student.
            limit: tokens allowed.
            drop_history: may the oldest (observation, action) pairs be left out?
            option: name of the limit's option, for the error.

        Returns:
            Token ids, and how many history pairs were dropped.

        Raises:
            PromptTooLong: naming the option, the length and the remedy. A prompt is never cut inside.
        """
        for dropped in range(len(context.history) + 1):
            ids = self.encode(context, skills, context.history[dropped:])
            if len(ids) <= limit:
                return ids, dropped
            if not drop_history:
                break
        raise PromptTooLong(
            f"{option}={limit} is too small for a prompt of {len(ids)} tokens at turn {context.step}"
            + (f" (all {len(context.history)} history pairs already dropped)" if drop_history else "")
            + f"; raise {option}, or shorten the skills or the history (sdar.prompt.history_length)"
        )
