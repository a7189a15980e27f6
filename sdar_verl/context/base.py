"""What a privileged context is made from, and what it gives: plain data, no verl, no tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdar_verl.envs.base import Task
from sdar_verl.untrusted import whole_characters


@dataclass(frozen=True)
class Passage:
    """Text for the teacher's slot. Halves of surrogate pairs in it become U+FFFD.

    Attributes:
        text: the text; empty when there is none.
        skills: names of the skills in it, in order; empty for other contexts.
        no_match: skills were asked for, but none is this task's own.
        dropped: skills that were found, but left out to keep within ``sdar.skills.max_tokens``.
    """

    text: str
    skills: tuple[str, ...] = ()
    no_match: bool = False
    dropped: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", whole_characters(self.text))


@dataclass(frozen=True)
class PlayedTurn:
    """One turn of a finished episode.

    Attributes:
        observation: what the agent saw.
        action: what it did; None where its answer held no action.
        valid: the answer held an action, and the environment offered it.
    """

    observation: str
    action: str | None
    valid: bool


@dataclass(frozen=True)
class PlayedEpisode:
    """A finished episode.

    Attributes:
        name: unique in its group, in an order that does not depend on which episode ended first.
        turns: in order.
        success: it solved its task.
        reward: its return.
        last_observation: what the environment answered to the last action.
        said: what a reward function said beside the reward: the judge's message, the test that failed.
    """

    name: str
    turns: tuple[PlayedTurn, ...]
    success: bool
    reward: float
    last_observation: str
    said: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ContextRequest:
    """What a context function may read.

    Attributes:
        task: the task.
        seed: ``sdar.context.seed``, for functions that draw.
        skills: the skills that retrieval finds for the task; called by the context ``skills`` and by whoever wants it.
        episode: the row's own episode; None for early contexts, which are made before it begins.
        siblings: the other episodes of its group, in order of their names; empty for early contexts. An episode whose
            environment failed is not among them.
        turn: which turn of the episode the row is, from 0; for contexts that differ by turn.
        number: which of several different texts is asked for, from 0 (``sdar.context.contrast.texts``). A function that
            has no more gives None, or the text that it gave before.
        count_tokens: of a text, by the policy's tokenizer; in the checks before the start, its words.
    """

    task: Task
    seed: int = 0
    skills: Callable[[], Passage] | None = None
    episode: PlayedEpisode | None = None
    siblings: tuple[PlayedEpisode, ...] = ()
    turn: int = 0
    number: int = 0
    count_tokens: Callable[[str], int] = lambda text: len(text.split())
