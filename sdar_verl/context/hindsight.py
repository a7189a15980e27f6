"""Contexts that somebody writes when the episodes have ended (``sdar.context.writer``): our own words throughout.

``lesson`` (SEED) is one text per episode; ``guide`` (GRSD) one per group of which some succeeded and some did not,
written of reflections on each of its episodes; ``hint`` (OPID, AHEAD, HERO) one per turn that the writer chooses.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from sdar_verl.context.base import ContextRequest, PlayedEpisode
from sdar_verl.context.prompt import Piece, Prompt, UnreadableAnswer, read_object, read_text
from sdar_verl.context.registry import ContextError, register_context
from sdar_verl.envs.base import Task

LESSON = "What an earlier attempt at this task taught:"
GUIDE = "What several attempts at this task taught:"
HINT = "A hint for this turn, written when the attempt was over:"


@register_context("lesson", late=True)
def lesson(request: ContextRequest, *, form: Literal["json", "text"] = "json") -> Generator[Prompt, str | None, Any]:
    """What the writer learns from the row's own episode, for somebody who is about to begin the task (SEED).

    Args:
        request: ``task`` and ``episode`` are read.
        form: of the answer: ``json`` asks for an object and takes its lesson; ``text`` takes the whole answer, for
            writers that cannot do that.
    """
    answer = yield Prompt(
        "An agent has made an attempt at a task. Read what happened.",
        *story(request.task, _episode(request, "lesson")),
        "Write down what this attempt teaches about doing the task: what worked and should be done again, what was a "
        "waste or a mistake, and what to do instead. Speak to somebody who is about to begin the same task and has not "
        "read the above. Be concrete, in at most six short sentences.",
        'Answer with one JSON object and nothing else: {"summary": "what happened, in one sentence", "lesson": "..."}'
        if form == "json"
        else "Answer with these sentences alone.",
    )
    if answer is None:
        return None
    learned = read_object(answer).get("lesson") if form == "json" else answer
    return f"{LESSON}\n{read_text(learned, 'lesson')}"


@register_context("guide", of_group=True)
def guide(request: ContextRequest) -> Generator[list[Prompt] | Prompt, Any, str | None]:
    """One guide for all episodes of a group of which some earned a return above 0 and some did not (GRSD).

    Every episode is reflected upon by itself, outcome told; a second prompt makes the guide of the reflections.
    """
    episodes = sorted((_episode(request, "guide"), *request.siblings), key=lambda episode: episode.name)
    if not (min(e.reward for e in episodes) <= 0 < max(e.reward for e in episodes)):
        return None
    said: list[str | None] = yield [
        Prompt(
            "An agent has made an attempt at a task. Read what happened.",
            *story(request.task, episode),
            "In at most four short sentences: which decisions made it end as it did, and what would have been better?",
        )
        for episode in episodes
    ]
    notes = [f"- It {_outcome(e)}. {note}" for e, note in zip(episodes, said, strict=True) if note]
    if not notes:
        return None
    answer: str | None = yield Prompt(
        f"Several attempts were made at one task. These are notes on {len(notes)} of them.",
        f"The task: {request.task.description}",
        notes,
        "Put together what they teach. Compare what succeeded with what failed, and write two short lists, at most "
        "five lines each: lines that begin with DO (what to do, and when) and lines that begin with AVOID (what led "
        "nowhere, and why). Answer with these lines alone.",
    )
    return None if answer is None else f"{GUIDE}\n{read_text(answer, 'guide')}"


@register_context("hint", by_turn=True)
def hint(
    request: ContextRequest,
    *,
    most: Annotated[int, Field(ge=1)] | None = None,
    rest: Literal["nothing", "lesson"] = "nothing",
    seen: bool = False,
) -> Generator[Prompt, str | None, str | None]:
    """Hints for single turns of the row's own episode: where it went wrong, or what mattered (AHEAD, OPID, HERO).

    Args:
        request: ``task``, ``episode`` and ``turn`` are read.
        most: turns that the writer may choose; None: as many as it likes.
        rest: what the other turns are shown: nothing, so that they have no teacher, or the lesson of the whole episode
            (OPID).
        seen: in front of the hint, what was seen after the turn and what the attempt earned (HERO).
    """
    episode = _episode(request, "hint")
    last = len(episode.turns)
    wanted = "single turns" if most is None else f"at most {most} turn{'s' if most > 1 else ''}"
    lesson_asked = '"lesson": "one for the whole attempt", ' if rest == "lesson" else ""
    answer = yield Prompt(
        "An agent has made an attempt at a task. Read what happened.",
        *story(request.task, episode),
        f"Choose {wanted} at which something else should have been done, or at which the right thing was done "
        "although it was not obvious. For each write a hint, one or two sentences, that would have helped the agent at "
        "that very turn: say what to look at or what to do, not how the attempt ended.",
        "Answer with one JSON object and nothing else: "
        f'{{{lesson_asked}"hints": [{{"turn": 1, "hint": "..."}}]}}. Turns are numbered from 1 to {last}.',
    )
    if answer is None:
        return None
    found = read_object(answer)
    hints = _hints(found.get("hints"), last, most)
    whole = read_text(found.get("lesson"), "lesson") if rest == "lesson" else ""
    text = hints.get(request.turn)
    if text is None:
        return f"{LESSON}\n{whole}" if whole else None
    return "\n".join([*(_after(episode, request.turn) if seen else ()), HINT, text])


def _hints(found: Any, last: int, most: int | None) -> dict[int, str]:
    """Turn, from 0, -> hint: the first ``most`` that are about a turn of the episode; of two for one turn the first."""
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise UnreadableAnswer("hints is no list")
    hints: dict[int, str] = {}
    for item in found:
        turn, text = (item.get("turn"), item.get("hint")) if isinstance(item, dict) else (None, None)
        number = _number(turn)
        if 1 <= number <= last and isinstance(text, str) and text.strip() and (most is None or len(hints) < most):
            hints.setdefault(number - 1, text.strip())
    if found and not hints:
        raise UnreadableAnswer("none of the hints names a turn and says something of it")
    return hints


def _number(value: Any) -> int:
    """A turn's number, also written as text; 0 for what is none."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 9:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _episode(request: ContextRequest, name: str) -> PlayedEpisode:
    if request.episode is None:
        raise ContextError(f"context {name!r} was asked for before the episode ended")
    return request.episode


def _outcome(episode: PlayedEpisode) -> str:
    return f"{'succeeded' if episode.success else 'did not succeed'} and earned {episode.reward:g}"


def _after(episode: PlayedEpisode, turn: int) -> list[str]:
    """What was seen after a turn, and the return."""
    following = episode.turns[turn + 1 : turn + 2]
    seen = following[0].observation if following else episode.last_observation
    shown = [f"What was seen after the answer to come:\n{seen}"] if seen else []
    return [*shown, f"The attempt {_outcome(episode)}."]


def story(task: Task, episode: PlayedEpisode) -> list[Piece]:
    """Task, turns and outcome of an episode, as pieces of a prompt whose oldest turns may be left out."""
    turns = []
    for number, turn in enumerate(episode.turns, 1):
        did = turn.action or "(nothing that could be read)"
        # A recipe's first observation is the question, which is the task.
        seen = "" if turn.observation == task.description else f" seen: {turn.observation}\n  "
        turns.append(f"Turn {number}.{seen} done: {did}{'' if turn.valid else ' (not accepted)'}")
    end = f"After that was seen: {episode.last_observation}\n" if episode.last_observation else ""
    return [f"The task: {task.description}", turns, f"{end}The attempt {_outcome(episode)}."]
