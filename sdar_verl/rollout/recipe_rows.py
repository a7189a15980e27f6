"""Rows of other agent loops than ours: what their data say of a task, and what their tokens say of an episode."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sdar_verl.envs.base import RECIPE, Task
from sdar_verl.rollout.actions import leaves_thought_open
from sdar_verl.rollout.messages import last_user_text
from sdar_verl.rollout.rows import EpisodeNote, RowInfo, TurnNote, turn_text
from sdar_verl.untrusted import shorten

_NOT_DATA = frozenset({"raw_prompt", "prompt", "multi_modal_data", "uid", "session_id", "agent_name", "global_steps"})


def task_of(columns: Mapping[str, Any]) -> Task:
    """The task of a row of verl's data: ``prompt``, ``data_source``, ``reward_model`` and whatever else it has.

    Its id is a hash of the prompt, its type the data source, its data all columns (lists and numbers made plain).
    """
    messages = [dict(message) for message in columns["raw_prompt"]]
    source = str(columns.get("data_source", "data"))
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True, default=str).encode()).hexdigest()[:16]
    data = {name: plain(value) for name, value in columns.items() if name not in _NOT_DATA}
    return Task(RECIPE, f"{source}/{digest}", source, last_user_text(messages), data)


def said(task_id: str, question: str) -> str:
    """A row, for a message: its id is a hash, but its question can be looked for."""
    return f"{task_id} ({shorten(question)})"


def plain(value: Any) -> Any:
    """numpy's arrays and scalars as lists and numbers, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def spans(mask: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of sampled tokens."""
    start = None
    for place, sampled in enumerate([*mask, 0]):
        if sampled and start is None:
            start = place
        elif not sampled and start is not None:
            yield start, place
            start = None


def record_of(
    task: Task,
    turn: int,
    prompt: Sequence[int],
    response: Sequence[int],
    mask: Sequence[int],
    tokenizer: Any = None,
    *,
    keep_data: bool = False,
) -> RowInfo:
    """The record of a row.

    Args:
        task: of the row.
        turn: turns of the episode's earlier rows.
        prompt: token ids of the student's prompt.
        response: token ids behind the prompt, tool answers among them.
        mask: 1 where the policy sampled.
        tokenizer: given where the words of the turns are wanted, for traces and late contexts.
        keep_data: keep the task's data with it.
    """
    info = RowInfo(turn, task.task_type, task_id=task.task_id, prompt_tokens=len(prompt), rewarded=True)
    if turn == 0:
        # The row's columns are in verl's queue already; late contexts read them here.
        info.episode = EpisodeNote(asdict(task if keep_data else replace(task, data={})))

    def words(start: int, stop: int) -> str:
        return tokenizer.decode(list(response[start:stop]), skip_special_tokens=True).strip()

    def sampled(start: int, stop: int) -> str:
        """What the policy wrote, with the thought that a chat template has begun for it."""
        before = [*prompt[-16:], *response[max(0, start - 16) : start]][-16:]
        return ("<think>\n" if leaves_thought_open(tokenizer.decode(before)) else "") + words(start, stop)

    found = list(spans(mask))
    notes = []
    for number, (start, stop) in enumerate(found):
        note = TurnNote(start, stop)
        if tokenizer is not None:
            before = found[number - 1][1] if number else 0
            after = found[number + 1][0] if number + 1 < len(found) else len(response)
            note.observation = words(before, start) if number else task.description
            note.action = sampled(start, stop)
            note.text = turn_text(task, "", note.observation, note.action, words(stop, after), 0.0)
        notes.append(note)
    if len(notes) == 1 and notes[0].start == 0 and notes[0].stop == len(response):
        info.observation, info.action, info.text = notes[0].observation, notes[0].action, notes[0].text
    else:
        info.turns = tuple(notes)
    return info
