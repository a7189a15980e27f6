"""Reads a skill bank in any of its formats; which one it is, is told by the content.

Agent Skills: folders of ``<name>/SKILL.md``, YAML front matter with ``name`` and ``description``, then the text in
Markdown. Two optional keys are ours: ``task-types`` (the environment's categories that the skill is for) and
``keywords`` (words of a task description that call for it). A skill with neither is general: it is for every task.
The two JSON formats are read by ``formats_json.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from sdar_verl.skills.formats_json import MAPPING_FILE, read_json_bank
from sdar_verl.skills.skill import MAX_FILE_BYTES, Skill, SkillBankError, collecting
from sdar_verl.text_files import read_text
from sdar_verl.untrusted import shorten

AGENT_SKILLS = "Agent Skills"
SKILL_FILE = "SKILL.md"
REQUIRED_KEYS = ("name", "description")
OUR_KEYS = ("task-types", "keywords")
# The last four belong to the Agent Skills format, and mean nothing here; others that are found are told.
KNOWN_KEYS = (*REQUIRED_KEYS, *OUR_KEYS, "license", "compatibility", "metadata", "allowed-tools")
_QUOTE = "quote numbers, yes, no, on, off"
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(?P<yaml>.*?)^---[ \t]*(\n|\Z)(?P<text>.*)", re.DOTALL | re.MULTILINE)

MAX_DEPTH = 8
"""Of the front matter's nesting; skills need two levels."""
MAX_FRONT_MATTER = 20_000
"""Characters; YAML is read slowly."""


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

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{', '.join(map(repr, twice))} stands there twice")
        return super().construct_mapping(node, deep)


@dataclass
class BankFiles:
    """What a bank's files hold.

    Attributes:
        format: name of the format.
        skills: each readable skill, and the file that it stands in.
        faults: what must be mended before the bank can be used.
        notes: what means nothing here.
    """

    format: str
    skills: list[tuple[Skill, Path]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_bank(path: Path, *, shipped: bool = False) -> BankFiles:
    """Everything that a bank holds, and everything that is wrong with it.

    Args:
        path: a folder of Agent Skills, a folder with ``skill_mapping.json``, or a JSON file in either JSON format.
        shipped: it comes with this package, whose files an installer may have made of links to its cache; the files of
            other banks must lie in their folder.
    Raises:
        SkillBankError: it cannot be read at all, or is in no known format.
    """
    try:
        return _read_bank(path, shipped)
    except OSError as error:
        raise SkillBankError(f"skill bank {path} cannot be read ({error})") from error


def _read_bank(path: Path, shipped: bool) -> BankFiles:
    if path.name == SKILL_FILE or (path / SKILL_FILE).is_file():
        alone = path.absolute().parent if path.name == SKILL_FILE else path.absolute()
        raise SkillBankError(
            f"{path} is one skill; a bank is the folder that its folder lies in: {alone.parent}. Put it into a folder "
            f"of its own ({alone.name}-bank/{alone.name}/{SKILL_FILE}) when it shall be the only one"
        )
    if path.is_file():
        return _read_json(path)
    # Files beside the skills (README, LICENSE) and hidden folders belong to whoever keeps the bank.
    entries = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "_")))
    if (path / MAPPING_FILE).is_file():
        doubtful = [entry.name for entry in entries if (entry / SKILL_FILE).is_file()]
        if doubtful:
            raise SkillBankError(
                f"{path} holds both {MAPPING_FILE} and {doubtful[0]}/{SKILL_FILE}: it is not clear which bank is "
                "meant; move one of them"
            )
        return _read_json(path / MAPPING_FILE)
    if not entries and (loose := sorted(path.glob("*.json"))):
        raise SkillBankError(
            f"{path} holds no <name>/{SKILL_FILE} and no {MAPPING_FILE}; if one of its JSON files is the bank, name "
            f"that file: sdar.skills.bank={loose[0]}"
        )
    found = BankFiles(AGENT_SKILLS)
    unknown: Counter[str] = Counter()
    empty = [entry for entry in entries if not (entry / SKILL_FILE).is_file() and not _meant(entry)]
    if len(empty) < len(entries):  # assets, docs
        found.notes += [f"{entry} holds no {SKILL_FILE}: passed over" for entry in empty]
        entries = [entry for entry in entries if entry not in empty]
    for file in (entry / SKILL_FILE for entry in entries):
        with collecting(found.faults):
            skill = _read_skill(file, None if shipped else path, unknown)
            if skill.name != file.parent.name and is_skill_name(file.parent.name):
                found.notes.append(
                    f"{file}: name {skill.name!r} differs from the folder's, which is the one that counts"
                )
                skill = replace(skill, name=file.parent.name)
            found.skills.append((skill, file))
    found.notes += [_about_key(key, count) for key, count in sorted(unknown.items())]
    return found


def _read_json(path: Path) -> BankFiles:
    found = BankFiles("")
    found.format = read_json_bank(path, found.skills, found.faults)
    return found


def _about_key(key: str, count: int) -> str:
    bare = re.sub(r"[^a-z]", "", key.lower()).removesuffix("s")
    ours = next((own for own in OUR_KEYS if own.replace("-", "").removesuffix("s") == bare), None)
    meant = f"; {ours} is meant?" if ours else ""
    return f"front matter: key {shorten(key)} of {count} skill{'s'[: count > 1]} means nothing here{meant}"


def _meant(folder: Path) -> str:
    """What lies in a folder of a bank in place of its file."""
    if nested := sorted(folder.glob(f"*/{SKILL_FILE}")):
        return f" (the folder {shorten(folder.name)} is a bank of its own, with {nested[0].parent.name})"
    here = [file.name for file in sorted(folder.glob("*")) if file.name.lower() == SKILL_FILE.lower()]
    return f" (rename {here[0]})" if here else ""


def _read_skill(path: Path, folder: Path | None, unknown: Counter[str]) -> Skill:
    if not path.is_file():
        raise SkillBankError(
            f"{path} is missing; every folder of a skill bank holds a {SKILL_FILE}{_meant(path.parent)}"
        )
    front, text = read_skill_file(path, folder)
    unknown.update(str(key) for key in front if key not in KNOWN_KEYS)
    return build_skill(path, front, text)


def read_skill_file(path: Path, folder: Path | None) -> tuple[dict[str, Any], str]:
    """Front matter and text.

    Args:
        path: a ``SKILL.md``.
        folder: in which it must lie, None: anywhere.

    Raises:
        SkillBankError: it cannot be read, or has no front matter, or one that is no YAML.
    """
    content = read_text(path, MAX_FILE_BYTES, folder, SkillBankError)
    match = _FRONT_MATTER.fullmatch(content)
    if match is None:
        raise SkillBankError(f"{path} has no front matter; begin it with '---', name, description, '---'")
    if len(match["yaml"]) > MAX_FRONT_MATTER:
        raise SkillBankError(f"{path}: front matter has more than {MAX_FRONT_MATTER} characters; put text below it")
    try:
        front = yaml.load(match["yaml"], Loader=_PlainLoader)  # a SafeLoader: it makes plain values only
    # A date or number that is none (2024-13-45) is a ValueError.
    # PyYAML lets the faults of a tagged scalar (x: !!bool maybe) through as they come.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        told = " ".join(str(error).split())
        if "mapping values are not allowed" in told:
            told += "; put a value that holds ': ' in quotes"
        raise SkillBankError(f"{path}: front matter is not valid YAML: {told}") from error
    if not isinstance(front, dict):
        raise SkillBankError(f"{path}: front matter must be 'key: value' lines, not {shorten(front)}")
    return front, match["text"].strip()


def build_skill(path: Path, front: Mapping[str, Any], text: str) -> Skill:
    """What :func:`read_skill_file` found, as a skill.

    Raises:
        SkillBankError: everything that is wrong with it.
    """
    faults = [
        f"{path}: {key!r} must be text, not {shorten(front.get(key))}; "
        + (f"add '{key}: ...' to the front matter" if isinstance(front.get(key), str | None) else _QUOTE)
        for key in REQUIRED_KEYS
        if not isinstance(front.get(key), str) or not front[key].strip()
    ]
    name = front.get("name")
    # Else the folder's name is the one that counts.
    if isinstance(name, str) and name.strip() and not is_skill_name(name) and not is_skill_name(path.parent.name):
        faults.append(f"{path}: name {shorten(name)} must be at most 64 lower-case letters, digits and single hyphens")
    if not text:
        faults.append(f"{path} has no text below the front matter; a teacher would learn nothing from it")
    lists: dict[str, tuple[str, ...]] = dict.fromkeys(OUR_KEYS, ())
    for key in OUR_KEYS:
        with collecting(faults):
            lists[key] = _strings(path, key, front.get(key))
    if faults:
        raise SkillBankError(*faults)
    return Skill(
        name=str(name),
        description=front["description"].strip(),
        text=text,
        task_types=lists["task-types"],
        keywords=lists["keywords"],
    )


def is_skill_name(text: str) -> bool:
    """At most 64 lower-case letters, digits and single hyphens."""
    return len(text) <= 64 and bool(_NAME.fullmatch(text))


def _strings(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):  # as others write it
        value = value.split(",") if value.strip() else []
    if not isinstance(value, list) or not all(isinstance(item, str) and re.search(r"[^\W_]", item) for item in value):
        raise SkillBankError(f"{path}: {key!r} must be a list of words, not {shorten(value)}; {_QUOTE}")
    return tuple(item.strip() for item in value)
