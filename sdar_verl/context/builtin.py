"""The contexts of this package; each is one function. Texts are our own words.

``skills``, ``answer``, ``column`` and ``demonstration`` are known before an episode begins; ``sibling``,
``failed_sibling``, ``own_failure``, ``feedback`` and ``next_observation`` are late, known when its whole group has
ended. What they stand for in the literature: docs/contexts.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from random import Random
from typing import Any, Literal, get_args

from sdar_verl.context import hindsight  # noqa: F401  registers those that somebody writes
from sdar_verl.context.base import ContextRequest, Passage, PlayedEpisode
from sdar_verl.context.registry import ContextError, register_context
from sdar_verl.envs.registry import demonstration_of
from sdar_verl.rollout.actions import without_thought

SiblingChoice = Literal["shortest", "first", "random"]


@register_context("skills")
def skills(request: ContextRequest) -> Passage:
    """The skills that ``sdar.skills.retrieval`` finds for the task (arXiv:2605.15155): the paper's context."""
    if request.skills is None:
        raise ContextError("context 'skills' was asked for where no skill bank is loaded")
    return request.skills()


@register_context("answer")
def answer(request: ContextRequest, *, field: str | None = None) -> str | None:
    """The ground truth of the task, from its data: a text, a number, or a list of them (any of which is right); None
    where it has none.

    Args:
        request: ``task`` is read.
        field: of the task's data, with dots into it; None: verl's ``reward_model.ground_truth``, or ``answers`` of a
            text environment.
    """
    graded = isinstance(request.task.data.get("reward_model"), Mapping)
    truth = request.task.at(field or ("reward_model.ground_truth" if graded else "answers"))
    answers = _texts(truth, "the ground truth" if field is None else field)
    if not answers:
        return None
    if len(answers) == 1:
        return f"The right answer is: {answers[0]}"
    return "Any of these answers is right:\n" + _listed(answers)


@register_context("demonstration")
def demonstration(request: ContextRequest) -> str | None:
    """Actions that solve this very task, from its data (key ``demonstration``) or from the environment.

    ALFWorld knows the game's walkthrough, WebShop finds a purchase with the full score, Search-QA's generated questions
    bring their searches. None where nobody knows a solution.
    """
    actions = demonstration_of(request.task)
    if not actions:
        return None
    return "Actions that solve this task, in order:\n" + _listed(actions)


@register_context("column")
def column(request: ContextRequest, *, path: str, intro: str = "") -> str | None:
    """A column of the row's data, such as a worked solution; None where the row has none.

    Args:
        request: ``task`` is read.
        path: of the column, with dots into what it holds: ``extra_info.solution``.
        intro: a line before it.
    """
    text = "\n".join(_texts(request.task.at(path), path))
    if not text:
        return None
    return f"{intro}\n{text}" if intro else text


def _texts(value: Any, name: str) -> list[str]:
    """What a value of a data file says: nothing, where it is a gap of a table (None, NaN) or blank. Search-R1's ground
    truth is an object with the answers as its target.

    Raises:
        ContextError: ``name`` holds objects or bytes, which say nothing to a reader.
    """
    if isinstance(value, Mapping) and "target" in value:
        return _texts(value["target"], name)
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, Mapping | list | tuple | bytes):
            keys = f" with {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
            raise ContextError(
                f"{name} holds {type(item).__name__}{keys}, not a text; use the context column with "
                "sdar.context.options.column.path down to the text, with dots (reward_model.ground_truth.solution)"
            )
    return _said(value)


def _said(value: Any) -> list[str]:
    """The texts of a value, or of a list of them; None, NaN and blanks are gaps."""
    items = value if isinstance(value, list | tuple) else [value]
    return [text for item in items if item is not None and item == item and (text := str(item)).strip()]


@register_context("sibling", of_group=True)
def sibling(
    request: ContextRequest,
    *,
    choice: SiblingChoice = "shortest",
    observations: bool = True,
    threshold: float | None = None,
    thinking: bool = True,
    intro: str = "An attempt at this task that succeeded:",
) -> str | None:
    """A successful episode of the same group, never the row's own; None when there is none.

    Args:
        request: ``siblings`` are read, and ``number``: the next ones by ``choice``.
        choice: ``shortest`` (fewest turns; the first of several), ``first`` by its number in the group, or ``random``.
        observations: show what was seen at each turn, not the actions alone.
        threshold: success is a reward of at least this; None: what environment or reward function call success.
        thinking: False leaves out what stands before ``</think>``.
        intro: the line above it.
    """
    solved = [episode for episode in request.siblings if _solved(episode, threshold)]
    return _shown(request, intro, solved, choice, observations, thinking)


@register_context("failed_sibling", of_group=True)
def failed_sibling(
    request: ContextRequest,
    *,
    choice: SiblingChoice = "first",
    observations: bool = True,
    threshold: float | None = None,
    thinking: bool = True,
    intro: str = "An attempt at this task that failed:",
) -> str | None:
    """An episode of the same group that did not succeed, never the row's own; options as in :func:`sibling`."""
    failed = [episode for episode in request.siblings if not _solved(episode, threshold)]
    return _shown(request, intro, failed, choice, observations, thinking)


@register_context("own_failure", late=True)
def own_failure(
    request: ContextRequest,
    *,
    observations: bool = True,
    threshold: float | None = None,
    thinking: bool = True,
    intro: str = "An attempt at this task that failed:",
) -> str | None:
    """The row's own episode, where it did not succeed; None where it did. As ``sdar.context.contrast`` it is the wrong
    answer beside a right one, also in groups that all failed (SIPO); options as in :func:`sibling`."""
    own = [] if request.episode is None or _solved(request.episode, threshold) else [request.episode]
    return _shown(request, intro, own, "first", observations, thinking)


@register_context("next_observation", by_turn=True)
def next_observation(request: ContextRequest, *, hidden: bool = False) -> str | None:
    """What was really seen after this very turn (OCSD, AHEAD); each turn of an episode has its own.

    Args:
        request: ``episode`` and ``turn`` are read.
        hidden: the same words without the observation: what to compare it with, as ``sdar.context.contrast``.
    """
    episode = request.episode
    if episode is None or request.turn >= len(episode.turns):
        return None
    after = episode.turns[request.turn + 1 :]
    seen = after[0].observation if after else episode.last_observation
    return f"What was seen after the answer to come:\n{'(not shown)' if hidden else seen}" if seen else None


@register_context("feedback", late=True)
def feedback(request: ContextRequest, *, field: str | None = None) -> str | None:
    """What was said in the end about the row's own episode.

    Args:
        request: ``episode`` is read; with ``field`` also ``siblings``, one of which must have it.
        field: key of what the reward function said (its ``reward_extra_info``): a judge's message, a failed test. None
            where the row has none. Without it: outcome, invalid actions and last answer of the environment.
    """
    episode = request.episode
    if episode is None:
        raise ContextError("context 'feedback' was asked for before the episode ended")
    if field is not None:
        keys = {key for one in (episode, *request.siblings) for key in one.said}
        if field not in keys:
            known = ", ".join(sorted(keys)) or "nothing"
            raise ContextError(
                f"context 'feedback' reads {field!r} from what the reward function says, which says: {known}; name the "
                "right key in sdar.context.options.feedback.field, and have the function give it an empty text where "
                "it has nothing to say"
            )
        text = "\n".join(_said(episode.said.get(field))).strip()
        return f"What was said about this attempt:\n{text}" if text else None
    lines = [
        f"This attempt {'solved' if episode.success else 'did not solve'} the task; "
        f"it took {len(episode.turns)} turn{'s' if len(episode.turns) != 1 else ''} and earned {episode.reward:g}."
    ]
    invalid = [f"turn {i}: {turn.action or 'no action'}" for i, turn in enumerate(episode.turns, 1) if not turn.valid]
    if invalid:
        lines.append("Answers that the environment did not accept: " + "; ".join(invalid) + ".")
    if episode.last_observation:
        lines.append(f"The last thing seen was: {episode.last_observation}")
    return "\n".join(lines)


def _solved(episode: PlayedEpisode, threshold: float | None) -> bool:
    return episode.success if threshold is None else episode.reward >= threshold


def _shown(
    request: ContextRequest,
    title: str,
    episodes: list[PlayedEpisode],
    choice: str,
    observations: bool,
    thinking: bool,
) -> str | None:
    if choice not in get_args(SiblingChoice):
        raise ContextError(f"sibling has choice={choice!r}; use one of {', '.join(get_args(SiblingChoice))}")
    if choice == "shortest":
        episodes = sorted(episodes, key=lambda episode: len(episode.turns))  # the first of several stays the first
    elif choice == "random":
        own = "" if request.episode is None else request.episode.name
        Random(f"{request.seed}:{request.task.task_id}:{own}").shuffle(episodes)
    told = list(dict.fromkeys(_told(episode, observations, thinking) for episode in episodes))
    return f"{title}\n{told[request.number]}" if request.number < len(told) else None


def _told(episode: PlayedEpisode, observations: bool, thinking: bool) -> str:
    if not thinking:
        turns = [replace(turn, action=turn.action and without_thought(turn.action)) for turn in episode.turns]
        episode = replace(episode, turns=tuple(turns))
    if len(episode.turns) == 1 and episode.said:  # a recipe's row of one turn: its question is known, its answer is all
        return episode.turns[0].action or ""
    return "\n".join(_story(episode, observations))


def _story(episode: PlayedEpisode, observations: bool) -> Iterable[str]:
    for number, turn in enumerate(episode.turns, 1):
        did = turn.action or "(nothing that could be read)"
        yield f"{number}. seen: {turn.observation}\n   done: {did}" if observations else f"{number}. {did}"


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
