"""Skills are written or revised from training episodes: those that a run has traced (``sdar-verl skills learn``), or
those of a step, within the run (:mod:`sdar_verl.observe.skill_learning`).

What comes out is a *candidate*. Whether a skill of it is worth keeping is measured, on a panel that neither the run nor
the writer has seen (:mod:`sdar_verl.skills.take`).
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sdar_verl.atomic import write_text_atomically
from sdar_verl.context.base import PlayedEpisode, PlayedTurn
from sdar_verl.context.hindsight import story
from sdar_verl.context.prompt import Piece, Prompt, UnreadableAnswer, read_object, read_text
from sdar_verl.context.registry import Context
from sdar_verl.envs.base import Task
from sdar_verl.report.read import RunData, episodes
from sdar_verl.skills.bank import SkillBank
from sdar_verl.skills.formats import OUR_KEYS, SKILL_FILE, build_skill, is_skill_name, read_skill_file
from sdar_verl.skills.skill import Skill, SkillBankError
from sdar_verl.text_files import read_text as read_text_file
from sdar_verl.untrusted import whole_characters
from sdar_verl.words import first_words

if TYPE_CHECKING:
    from sdar_verl.writer.step import StepWriting

NOTE = "learned.json"
"""Beside a candidate's skills: of what it was made."""

PROVENANCE = ("learned-from", "writer", "revises", "episodes", "learned-as", "learned-at-step", "gain", "tasks")
"""What we write into a skill's ``metadata``; of a text that is revised, the earlier is no longer true."""

_READ = 10_000
"""Episodes of a run that are looked at, at most."""


@dataclass(frozen=True)
class Evidence:
    """Episodes of one task type.

    Attributes:
        task_type: the environment's.
        tasks: the task of each.
        played: what happened, as contexts read it.
    """

    task_type: str
    tasks: tuple[Task, ...]
    played: tuple[PlayedEpisode, ...]


def evidence(run: RunData, number: int, task_types: Sequence[str] = ()) -> list[Evidence]:
    """What a run's traces hold, by task type in alphabetical order.

    Args:
        run: a run that traced (``sdar.trace.every``).
        number: episodes per type, the latest ones; failures and successes in turn as long as there are both.
        task_types: only these; none: all that were played.

    Raises:
        SkillBankError: no trace, or a type that nobody played.
    """
    found: dict[str, list[tuple[Task, PlayedEpisode]]] = {}
    for turns in episodes(run, _READ):
        first = turns[0]
        task = Task("trace", str(first["task_id"]), str(first["task_type"]), str(first["task"]))
        found.setdefault(task.task_type, []).append((task, _played(turns)))
    if not found:
        raise SkillBankError(f"{run.folder} traced no episode to learn from; run it with sdar.trace.every=1")
    unknown = sorted(set(task_types) - set(found))
    if unknown:
        raise SkillBankError(
            f"{run.folder} traced no task of type {', '.join(unknown)}; it has {', '.join(sorted(found))}"
        )
    latest = {name: list(reversed(found[name])) for name in task_types or found}
    return choose(latest, number)


def choose(found: Mapping[str, Sequence[tuple[Task, PlayedEpisode]]], number: int) -> list[Evidence]:
    """Of the episodes of each task type the first ``number``, failures and successes in turn as long as there are
    both."""
    chosen = []
    for name in sorted(found):
        halves = [[pair for pair in found[name] if pair[1].success == success] for success in (False, True)]
        mixed = [pair for both in _alternately(*halves) for pair in both][:number]
        chosen.append(Evidence(name, tuple(task for task, _ in mixed), tuple(played for _, played in mixed)))
    return chosen


def write_skills(
    bank: SkillBank, seen: Sequence[Evidence], writing: StepWriting, max_words: int, step: int = 0
) -> dict[str, Skill]:
    """Have one skill of each task type written or revised.

    Args:
        bank: what is revised.
        seen: what to learn from.
        writing: asks the writer, all of them in one batch.
        max_words: of a skill's text.
        step: of the run, for the writer's draws.

    Returns:
        Task type -> skill, of those types whose answer is one.

    Raises:
        RolloutError: the writer does not do its work.
    """
    made: dict[str, Skill] = {}

    def one(shown: Evidence) -> Generator[Prompt, str | None, str | None]:
        own = [skill for skill in bank if shown.task_type in skill.task_types]
        others = {skill.name for skill in bank} - {skill.name for skill in own}
        skill = yield from ask(own, shown, max_words, others)
        if skill is None:
            return None
        if skill.name in {other.name for other in made.values()}:
            raise UnreadableAnswer(f"{skill.name} is what another task type's skill is called")
        made[shown.task_type] = skill
        return skill.text

    # The same machinery as for contexts: one batch, fitted, counted.
    context = Context("skills learn", one, late=True, writes=True)
    writing.passages({shown.task_type: (context, shown, {}) for shown in seen}, step)
    return made


def ask(
    known: Sequence[Skill], seen: Evidence, max_words: int, taken: Collection[str] = ()
) -> Generator[Prompt, str | None, Skill | None]:
    """Have one skill of a task type written or revised.

    Args:
        known: skills that the bank has for the type.
        seen: what to learn from.
        max_words: of its text.
        taken: names of skills for other tasks.

    Raises:
        UnreadableAnswer: the answer is no skill, too long, or takes a name that is none.
    """
    shown: list[Piece] = []
    for skill in known:
        shown.append(f"The skill {skill.name} ({skill.description}):\n{skill.text}")
    for number, (task, played) in enumerate(zip(seen.tasks, seen.played, strict=True), 1):
        shown += [f"Attempt {number}.", *story(task, played)]
    names = ", ".join(skill.name for skill in known)
    answer = yield Prompt(
        f"An agent is told skills before it begins a task. You keep those for tasks of the type {seen.task_type}.",
        *shown,
        (f"Revise one of the skills ({names}), or write a further one" if known else "Write a skill for these tasks")
        + ", so that attempts like those that failed would succeed. Keep what is right and was useful. Say what holds "
        "for all tasks of the type, never an answer that fits one of them alone (where one object was, what one page "
        f"said). At most {max_words} words, in plain sentences or a short list.",
        'Answer with one JSON object and nothing else: {"name": "lower-case-words-with-hyphens", "description": "one '
        'line", "text": "..."}. The name of an existing skill means that the text takes its place.',
    )
    if answer is None:
        return None
    found = read_object(answer)
    name, description, text = (_plain(read_text(found.get(key), key)) for key in ("name", "description", "text"))
    if not is_skill_name(name):
        raise UnreadableAnswer(f"{name!r} is no name of a skill")
    if first_words(text, max_words) is not None:
        raise UnreadableAnswer(f"the text has more than {max_words} words")
    if name in taken:
        raise UnreadableAnswer(f"{name} is the name of a skill for other tasks")
    old = next((skill for skill in known if skill.name == name), None)
    made = Skill(name, " ".join(description.split()), text, (seen.task_type,))
    return made if old is None else replace(old, description=made.description, text=text)


def _plain(text: str) -> str:
    """Whole characters and line feeds: what a file of it gives back."""
    lines = whole_characters(text).expandtabs(4).splitlines()
    return "\n".join("".join(filter(str.isprintable, line)) for line in lines)


def write_bank(bank: SkillBank, folder: Path, provenance: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a bank as a folder of Agent Skills.

    Of a bank that is one already, the files beside a skill's own are copied, and so is that where it is as it was; else
    it keeps the keys of its front matter that say nothing to us.

    Args:
        bank: its skills, and where it was read.
        folder: a skill's file is ``<name>/SKILL.md`` in it.
        provenance: name -> plain values for the front matter's ``metadata``, in the place of earlier ones.
    """
    for skill in bank:
        old = (bank.origin or folder) / skill.name / SKILL_FILE
        front: dict[str, Any] = {}
        if old.is_file():
            shutil.copytree(old.parent, folder / skill.name, symlinks=True, dirs_exist_ok=True)
            front, text = read_skill_file(old, None)
            if skill.name not in provenance and replace(build_skill(old, front, text), name=skill.name) == skill:
                write_text_atomically(folder / skill.name / SKILL_FILE, read_text_file(old))  # of a link, what it shows
                continue
        front = {key: value for key, value in front.items() if key not in OUR_KEYS}
        front |= {"name": skill.name, "description": skill.description}
        front |= {"task-types": list(skill.task_types)} if skill.task_types else {}
        front |= {"keywords": list(skill.keywords)} if skill.keywords else {}
        if skill.name in provenance:
            known = front.get("metadata")
            notes = known.items() if isinstance(known, dict) else ()
            front["metadata"] = {key: value for key, value in notes if key not in PROVENANCE}
            front["metadata"] |= provenance[skill.name]
        head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=110)
        write_text_atomically(folder / skill.name / SKILL_FILE, f"---\n{head}---\n{skill.text}\n")


def write_note(folder: Path, note: Mapping[str, Any]) -> None:
    """Write a candidate's note; last, for without it the folder is no candidate."""
    write_text_atomically(folder / NOTE, json.dumps(note, indent=1, ensure_ascii=False) + "\n")


def difference_of(old: Skill | None, new: Skill) -> str:
    """What a person reads: a unified diff of description and text."""
    before = [] if old is None else [old.description, "", *old.text.splitlines()]
    lines = difflib.unified_diff(
        before,
        [new.description, "", *new.text.splitlines()],
        fromfile="(new)" if old is None else f"{new.name} (bank)",
        tofile=f"{new.name} (learned)",
        lineterm="",
    )
    return "\n".join(lines)


def _alternately(one: Sequence[Any], other: Sequence[Any]) -> Iterable[list[Any]]:
    for number in range(max(len(one), len(other))):
        yield [row[number] for row in (one, other) if number < len(row)]


def _played(turns: Sequence[Mapping[str, Any]]) -> PlayedEpisode:
    last = turns[-1]
    return PlayedEpisode(
        str(turns[0]["episode"]),
        tuple(
            PlayedTurn(str(turn["observation"] or ""), turn["action"], not (turn["unparsed"] or turn["inadmissible"]))
            for turn in turns
        ),
        bool(last["success"]),
        float(last["episode_reward"] or 0.0),
        str(last["result"] or ""),
    )
