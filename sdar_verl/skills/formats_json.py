"""The two JSON formats of skill banks.

``skill_mapping.json`` (released code of SDAR): ``skill_files`` names Markdown files beside it, ``task_to_skill`` says
which one each task type gets, ``task_keywords`` lists words that tell the task type. The file ``general_skills`` is for
every task.

SkillRL: one file with lists of short principles: ``general_skills``, ``task_specific_skills`` (or
``query_type_skills``) by task type, and ``common_mistakes``. Each principle becomes a skill of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sdar_verl.skills.skill import MAX_FILE_BYTES, Skill, SkillBankError, collecting
from sdar_verl.text_files import read_text
from sdar_verl.untrusted import parse_json, shorten

MAPPING_FILE = "skill_mapping.json"
MAPPING, SKILLRL = "skill_mapping.json", "SkillRL"
MAX_JSON_BYTES = 4_000_000

_GENERAL = "general_skills"
_BY_TYPE = ("task_specific_skills", "query_type_skills")
_MISTAKES = "common_mistakes"


def read_json_bank(path: Path, skills: list[tuple[Skill, Path]], faults: list[str]) -> str:
    """Name of the format.

    Args:
        path: the file.
        skills: gets each readable skill, with the file that it stands in.
        faults: gets what is wrong with the others.

    Raises:
        SkillBankError: not JSON, in neither format, or a part of it that holds skills is of the wrong type.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if doubled := _doubled(key for key, _ in pairs):
            raise SkillBankError(
                f"{path}: duplicate names {shorten(doubled)} in one object; JSON would keep the last only"
            )
        return dict(pairs)

    try:
        content = parse_json(read_text(path, MAX_JSON_BYTES, fault=SkillBankError), unique)
    except SkillBankError:
        raise
    except ValueError as error:
        raise SkillBankError(f"{path} is not valid JSON ({error}); repair it") from error
    if isinstance(content, dict) and "skill_files" in content:
        _read_mapping(path, content, skills, faults)
        return MAPPING
    if isinstance(content, dict) and any(key in content for key in (_GENERAL, *_BY_TYPE, _MISTAKES)):
        for read in _read_principles(path, content):
            with collecting(faults):
                skills.append((read(), path))
        if doubled := _doubled(skill.name for skill, _ in skills):
            faults.append(f"{path}: duplicate skill names {shorten(doubled)}; give each skill_id once")
        return SKILLRL
    keys = shorten(sorted(content)) if isinstance(content, dict) else type(content).__name__
    raise SkillBankError(
        f"{path} is no skill bank: it has {keys}, but neither 'skill_files' (the released {MAPPING_FILE}) nor "
        f"'{_GENERAL}' or '{_BY_TYPE[0]}' (SkillRL)"
    )


# ---------------------------------------------------------------- skill_mapping.json


def _read_mapping(path: Path, content: Mapping[str, Any], skills: list[tuple[Skill, Path]], faults: list[str]) -> None:
    files = _strings_by_name(path, "skill_files", content["skill_files"])
    skill_of = _strings_by_name(path, "task_to_skill", content.get("task_to_skill", {}))
    keywords = _object(path, "task_keywords", content.get("task_keywords", {}))
    if unknown := sorted(set(skill_of.values()) - set(files)):
        faults.append(f"{path}: task_to_skill names the skills {unknown}, which skill_files does not list")
    if unknown := sorted(set(keywords) - set(skill_of)):
        faults.append(f"{path}: task_keywords has the task types {unknown}, which task_to_skill does not list")
    names: dict[str, str] = {}
    for key, file in files.items():
        with collecting(faults):
            types = tuple(task_type for task_type, skill in skill_of.items() if skill == key)
            words = tuple(word for task_type in types for word in _words(path, task_type, keywords.get(task_type, [])))
            if not types and key != _GENERAL:
                raise SkillBankError(
                    f"{path}: skill {key!r} is for no task type; name it in task_to_skill, or call it {_GENERAL!r} "
                    "when it is for every task"
                )
            name = _slug(path, key)
            if name in names:
                raise SkillBankError(f"{path}: duplicate skill names {[names[name], key]}; rename one of them")
            names[name] = key
            source = path.parent / file
            if not source.is_file():
                raise SkillBankError(f"{source} is missing; {path} names it as the skill {key!r}")
            text = read_text(source, MAX_FILE_BYTES, path.parent, SkillBankError).strip()
            if not text:
                raise SkillBankError(f"{source} has no text; a teacher would learn nothing from it")
            first = text.splitlines()[0].lstrip("# ").strip()
            skills.append((Skill(name, first or name, text, types, tuple(dict.fromkeys(words))), source))


# ---------------------------------------------------------------- SkillRL


def _read_principles(path: Path, content: Mapping[str, Any]) -> Iterator[Callable[[], Skill]]:
    """Readers of one skill each."""
    for index, item in enumerate(_list(path, _GENERAL, content.get(_GENERAL, []))):
        yield partial(_principle, path, f"{_GENERAL}[{index}]", item)
    present = [key for key in _BY_TYPE if key in content]
    for key in present:
        for task_type, items in _object(path, key, content[key]).items():
            for index, item in enumerate(_list(path, f"{key}.{task_type}", items)):
                yield partial(_principle, path, f"{key}.{task_type}[{index}]", item, task_type)
    for index, item in enumerate(_list(path, _MISTAKES, content.get(_MISTAKES, []))):
        yield partial(_mistake, path, f"{_MISTAKES}[{index}]", item)


def _mistake(path: Path, where: str, item: Any) -> Skill:
    what, why, remedy = (_text(path, where, item, key) for key in ("description", "why_it_happens", "how_to_avoid"))
    name = _slug(path, _text(path, where, item, "mistake_id"))
    return Skill(name, what, f"Mistake: {what}\nCause: {why}\nInstead: {remedy}")


def _principle(path: Path, where: str, item: Any, task_type: str | None = None) -> Skill:
    title, principle = _text(path, where, item, "title"), _text(path, where, item, "principle")
    text = f"{title}: {principle}"
    if item.get("when_to_apply"):
        text += f"\nApplies: {_text(path, where, item, 'when_to_apply')}"
    name = _slug(path, _text(path, where, item, "skill_id"))
    return Skill(name, title, text, (task_type,) if task_type else ())


# ---------------------------------------------------------------- values


def _doubled(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _slug(path: Path, name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug:
        raise SkillBankError(f"{path}: skill name {name!r} has no letter or digit; rename it")
    return slug


def _text(path: Path, where: str, item: Any, key: str) -> str:
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise SkillBankError(f"{path}: {where}.{key} must be text, not {shorten(value)}; fill it in")
    return value.strip()


def _list(path: Path, where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise SkillBankError(f"{path}: {where} must be a list, not {type(value).__name__}")
    return value


def _object(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SkillBankError(f"{path}: {where} must be an object, not {type(value).__name__}")
    return value


def _strings_by_name(path: Path, where: str, value: Any) -> dict[str, str]:
    for key, item in _object(path, where, value).items():
        if not isinstance(item, str) or not item.strip():
            raise SkillBankError(f"{path}: {where}.{key} must be text, not {shorten(item)}")
    return value


def _words(path: Path, task_type: str, value: Any) -> list[str]:
    words = _list(path, f"task_keywords.{task_type}", value)
    if faulty := [word for word in words if not isinstance(word, str) or not re.search(r"[^\W_]", word)]:
        raise SkillBankError(f"{path}: task_keywords.{task_type} must be words, not {shorten(faulty)}")
    return words
