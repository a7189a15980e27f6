"""Reads a skill bank in any of its formats; which one it is, is told by the content.

Agent Skills: folders of ``<name>/SKILL.md``, YAML front matter with ``name`` and ``description``, then the text in
Markdown. Two optional keys are ours: ``task-types`` (the environment's categories that the skill is for) and
``keywords`` (words of a task description that call for it). A skill with neither is general: it is for every task.
The two JSON formats are read by ``formats_json.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sdar_verl.skills.formats_json import MAPPING_FILE, read_json_bank
from sdar_verl.skills.skill import MAX_FILE_BYTES, Skill, SkillBankError
from sdar_verl.text_files import read_text
from sdar_verl.untrusted import shorten

AGENT_SKILLS = "Agent Skills"
SKILL_FILE = "SKILL.md"
REQUIRED_KEYS = ("name", "description")
# The last four belong to the Agent Skills format; they are accepted so that such folders load, and mean nothing here.
KNOWN_KEYS = (*REQUIRED_KEYS, "task-types", "keywords", "license", "compatibility", "metadata", "allowed-tools")
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_FRONT_MATTER = re.compile(r"---[ \t]*\n(?P<yaml>.*?)^---[ \t]*(\n|\Z)(?P<text>.*)", re.DOTALL | re.MULTILINE)

MAX_DEPTH = 8
"""Of the front matter's nesting; skills need two levels."""


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases, by which a few lines can stand for billions of values."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not used in skills; write the value out")
        if self._depth == MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def read_bank(path: Path, *, shipped: bool = False) -> tuple[str, dict[Skill, Path]]:
    """Name of the format, and each skill with the file that it stands in.

    Args:
        path: a folder of Agent Skills, a folder with ``skill_mapping.json``, or a JSON file in either JSON format.
        shipped: it comes with this package, whose files an installer may have made of links to its cache; the files of
            other banks must lie in their folder.
    Raises:
        SkillBankError: a file that is missing, unreadable, empty, or in no known format.
    """
    try:
        return _read_bank(path, shipped)
    except OSError as error:
        raise SkillBankError(f"skill bank {path} cannot be read ({error})") from error


def _read_bank(path: Path, shipped: bool) -> tuple[str, dict[Skill, Path]]:
    if path.is_file():
        return read_json_bank(path)
    # Files beside the skills (README, LICENSE) and hidden folders belong to whoever keeps the bank.
    entries = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "_")))
    if (path / MAPPING_FILE).is_file():
        doubtful = [entry.name for entry in entries if (entry / SKILL_FILE).is_file()]
        if doubtful:
            raise SkillBankError(
                f"{path} holds both {MAPPING_FILE} and {doubtful[0]}/{SKILL_FILE}: it is not clear which bank is "
                "meant; move one of them"
            )
        return read_json_bank(path / MAPPING_FILE)
    if not entries and (loose := sorted(path.glob("*.json"))):
        raise SkillBankError(
            f"{path} holds no <name>/{SKILL_FILE} and no {MAPPING_FILE}; if one of its JSON files is the bank, name "
            f"that file: sdar.skills.bank={loose[0]}"
        )
    files = [entry / SKILL_FILE for entry in entries]
    return AGENT_SKILLS, {_read_skill(file, None if shipped else path): file for file in files}


def _read_skill(path: Path, folder: Path | None) -> Skill:
    if not path.is_file():
        raise SkillBankError(f"{path} is missing; every folder of a skill bank holds a {SKILL_FILE}")
    content = read_text(path, MAX_FILE_BYTES, folder, SkillBankError)
    match = _FRONT_MATTER.fullmatch(content)
    if match is None:
        raise SkillBankError(f"{path} has no front matter; begin it with '---', name, description, '---'")
    try:
        front = yaml.load(match["yaml"], Loader=_PlainLoader)  # a SafeLoader: it makes plain values only
    # A date or number that is none (2024-13-45) is a ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SkillBankError(f"{path}: front matter is not valid YAML: {error}") from error
    return _build_skill(path, front, match["text"].strip())


def _build_skill(path: Path, front: Any, text: str) -> Skill:
    if not isinstance(front, dict):
        raise SkillBankError(f"{path}: front matter must be 'key: value' lines, not {shorten(front)}")
    unknown = sorted(str(key) for key in front if key not in KNOWN_KEYS)
    if unknown:
        raise SkillBankError(f"{path}: unknown keys {unknown} in the front matter; known are {list(KNOWN_KEYS)}")
    for key in REQUIRED_KEYS:
        value = front.get(key)
        if not isinstance(value, str) or not value.strip():
            raise SkillBankError(
                f"{path}: {key!r} must be text, not {shorten(value)}; add '{key}: ...' to the front matter"
            )
    name = front["name"]
    if not _NAME.fullmatch(name) or len(name) > 64:
        raise SkillBankError(f"{path}: name {name!r} must be at most 64 lower-case letters, digits and single hyphens")
    if name != path.parent.name:
        raise SkillBankError(f"{path}: name {name!r} differs from the folder {path.parent.name!r}; make them equal")
    if not text:
        raise SkillBankError(f"{path} has no text below the front matter; a teacher would learn nothing from it")
    return Skill(
        name=name,
        description=front["description"].strip(),
        text=text,
        task_types=_strings(path, "task-types", front.get("task-types", [])),
        keywords=_strings(path, "keywords", front.get("keywords", [])),
    )


def _strings(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and re.search(r"[^\W_]", item) for item in value):
        raise SkillBankError(
            f"{path}: {key!r} must be a list of words, not {shorten(value)}; quote numbers, yes, no, on, off"
        )
    return tuple(item.strip() for item in value)
