"""Skill banks: folders of ``<name>/SKILL.md`` files, loaded, validated and content-hashed.

The format is that of Agent Skills: YAML front matter with ``name`` and ``description``, then the text in Markdown. Two
optional keys are ours: ``task-types`` (the environment's categories that the skill is for) and ``keywords`` (words of a
task description that call for it). A skill with neither is general: it applies to every task.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

BANKS_DIR = Path(__file__).parent / "banks"
SKILL_FILE = "SKILL.md"
# A skill lies in every teacher prompt: more than this (about 5,000 tokens) is a wrong file, not a skill.
MAX_FILE_BYTES = 20_000
REQUIRED_KEYS = ("name", "description")
# The last four belong to the Agent Skills format; they are accepted so that such folders load, and mean nothing here.
KNOWN_KEYS = (*REQUIRED_KEYS, "task-types", "keywords", "license", "compatibility", "metadata", "allowed-tools")
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_FRONT_MATTER = re.compile(r"---[ \t]*\n(?P<yaml>.*?)^---[ \t]*(\n|\Z)(?P<text>.*)", re.DOTALL | re.MULTILINE)


class SkillBankError(ValueError):
    """A bank or one of its files that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Skill:
    """One piece of privileged context.

    Attributes:
        name: unique within its bank, the name of its folder.
        description: one line for people who list the bank.
        text: what goes into the teacher's prompt.
        task_types: categories of the environment that it is for.
        keywords: words or CamelCase names in a task description that call for it.
    """

    name: str
    description: str
    text: str
    task_types: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()

    @property
    def general(self) -> bool:
        """True for a skill that applies to every task: it has neither task types nor keywords."""
        return not self.task_types and not self.keywords


class SkillBank:
    """Skills in order of their names; immutable.

    Args:
        skills: the skills, in any order.
        name: of the bank, for messages.
    Raises:
        SkillBankError: no skill, or two of one name.
    """

    def __init__(self, skills: Sequence[Skill], name: str = "bank") -> None:
        self.name = name
        self._skills = tuple(sorted(skills, key=lambda skill: skill.name))
        if not self._skills:
            raise SkillBankError(f"skill bank {name!r} is empty; add folders <skill-name>/{SKILL_FILE}")
        names = [skill.name for skill in self._skills]
        duplicates = sorted({one for one, other in itertools.pairwise(names) if one == other})
        if duplicates:
            raise SkillBankError(f"skill bank {name!r}: duplicate skill names {duplicates}; rename all but one of each")

    def __iter__(self) -> Iterator[Skill]:
        return iter(self._skills)

    def __len__(self) -> int:
        return len(self._skills)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the skills' content; the same on every machine, whatever the folder and the line ends."""
        content = json.dumps([asdict(skill) for skill in self._skills], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def load(cls, name_or_path: str | Path, task_types: Collection[str] | None = None) -> SkillBank:
        """Read a shipped bank or a folder of the user's.

        Args:
            name_or_path: a shipped name (``alfworld``) or the path of a folder of ``<name>/SKILL.md``.
            task_types: the environment's categories; a skill for another one is then an error.
        Raises:
            SkillBankError: unknown bank, or a file that is missing or invalid.
        """
        folder = _find(name_or_path)
        # Files beside the skills (README, LICENSE) and hidden folders belong to whoever keeps the bank.
        entries = sorted(
            entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "_"))
        )
        skills = [_read_skill(entry / SKILL_FILE) for entry in entries]
        if task_types is not None:
            for skill in skills:
                _check_task_types(skill, folder / skill.name / SKILL_FILE, task_types)
        return cls(skills, name=str(name_or_path))


def bank_names() -> list[str]:
    """Names of the banks that come with the package."""
    return sorted(entry.name for entry in BANKS_DIR.iterdir() if entry.is_dir())


def _find(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if name in bank_names():
        return BANKS_DIR / name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise SkillBankError(f"skill bank {name!r} is neither one of {bank_names()} nor a folder")
    return folder


def _check_task_types(skill: Skill, path: Path, known: Collection[str]) -> None:
    unknown = sorted(set(skill.task_types) - set(known))
    if unknown:
        raise SkillBankError(f"{path}: unknown task types {unknown}; the environment has {sorted(known)}")


def _read_skill(path: Path) -> Skill:
    if not path.is_file():
        raise SkillBankError(f"{path} is missing; every folder of a skill bank holds a {SKILL_FILE}")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise SkillBankError(f"{path} has {size} bytes, more than {MAX_FILE_BYTES}; shorten it or split it into skills")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SkillBankError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    match = _FRONT_MATTER.fullmatch(content)
    if match is None:
        raise SkillBankError(f"{path} has no front matter; begin it with '---', name, description, '---'")
    try:
        front = yaml.safe_load(match["yaml"])
    except yaml.YAMLError as error:
        raise SkillBankError(f"{path}: front matter is not valid YAML: {error}") from error
    return _build_skill(path, front, match["text"].strip())


def _build_skill(path: Path, front: Any, text: str) -> Skill:
    if not isinstance(front, dict):
        raise SkillBankError(f"{path}: front matter must be 'key: value' lines, not {front!r}")
    unknown = sorted(str(key) for key in front if key not in KNOWN_KEYS)
    if unknown:
        raise SkillBankError(f"{path}: unknown keys {unknown} in the front matter; known are {list(KNOWN_KEYS)}")
    for key in REQUIRED_KEYS:
        value = front.get(key)
        if not isinstance(value, str) or not value.strip():
            raise SkillBankError(f"{path}: {key!r} must be text, not {value!r}; add '{key}: ...' to the front matter")
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
        raise SkillBankError(f"{path}: {key!r} must be a list of words, not {value!r}; quote numbers, yes, no, on, off")
    return tuple(item.strip() for item in value)
