"""Skill banks: loaded from any of three formats, validated and content-hashed.

The formats are Agent Skills (folders of ``<name>/SKILL.md``), the ``skill_mapping.json`` of SDAR's released code, and
SkillRL's JSON; which one it is, is read from the content (``sdar_verl/skills/formats.py``).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sdar_verl.skills.skill import MAX_FILE_BYTES, Skill, SkillBankError, collecting

__all__ = ["MAX_FILE_BYTES", "Skill", "SkillBank", "SkillBankError", "bank_names"]

BANKS_DIR = Path(__file__).parent / "banks"


class SkillBank:
    """Skills in order of their names; immutable.

    Args:
        skills: the skills, in any order.
        name: of the bank, for messages.
        origin: where it was read from: a folder or a file.
        format: which of the formats it is in.
        notes: what its files hold that means nothing here.
    Raises:
        SkillBankError: no skill, or two of one name.
    """

    def __init__(
        self,
        skills: Sequence[Skill],
        name: str = "bank",
        origin: Path | None = None,
        format: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        self.name, self.origin, self.format, self.notes = name, origin, format, tuple(notes)
        self._skills = tuple(sorted(skills, key=lambda skill: skill.name))
        if not self._skills:
            raise SkillBankError(f"skill bank {name!r} is empty; add folders <skill-name>/SKILL.md")
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

    @property
    def specific(self) -> tuple[Skill, ...]:
        """The skills that are not for every task."""
        return tuple(skill for skill in self._skills if not skill.general)

    def with_skills(self, skills: Iterable[Skill]) -> SkillBank:
        """This bank with further skills; they take the place of their namesakes."""
        merged = {skill.name: skill for skill in (*self, *skills)}
        return SkillBank(list(merged.values()), self.name, self.origin, self.format, self.notes)

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        task_types: Collection[str] | None = None,
        renamed: Mapping[str, Sequence[str]] | None = None,
        aliases: Mapping[str, Sequence[str]] | None = None,
    ) -> SkillBank:
        """Read a shipped bank, or a folder or file of the user's.

        Args:
            name_or_path: a shipped name (``alfworld``) or a path, in any of the formats.
            task_types: the environment's categories; a skill for another one is then an error.
            renamed: the bank's name of a task type -> the environment's, which may be several or none
                (``sdar.skills.task_types``).
            aliases: other names for task types, as the environment knows them; used where a name is none of its own.
        Raises:
            SkillBankError: every fault that was found: unknown bank, files that are missing or invalid, unknown task
                types, or a name in ``renamed`` that no skill has.
        """
        from sdar_verl.skills.formats import read_bank

        path = _find(name_or_path)
        found = read_bank(path, shipped=path.parent == BANKS_DIR)
        faults, readable = list(found.faults), [skill for skill, _ in found.skills]
        if readable or not faults:
            with collecting(faults):
                bank = cls(readable, name=str(name_or_path), origin=path, format=found.format, notes=found.notes)
                if renamed:
                    bank = bank._rename(renamed)
                if task_types and aliases:
                    own = {task_type for skill in bank for task_type in skill.task_types} - set(task_types)
                    bank = bank._rename({name: aliases[name] for name in own if name in aliases})
                if task_types is not None:
                    bank._check_task_types({skill.name: file for skill, file in found.skills}, task_types)
        if faults:
            raise SkillBankError(*faults)
        return bank

    def _rename(self, renamed: Mapping[str, Sequence[str]]) -> SkillBank:
        known = {task_type for skill in self for task_type in skill.task_types}
        if unused := sorted(set(renamed) - known):
            raise SkillBankError(
                f"task types {unused} are renamed (sdar.skills.task_types), but no skill of bank {self.name!r} has "
                f"them; it has {sorted(known)}"
            )
        skills = []
        for skill in self:
            types = tuple(dict.fromkeys(new for old in skill.task_types for new in renamed.get(old, (old,))))
            if skill.task_types and not types and not skill.keywords:
                continue  # renamed to nothing: the environment has no such task, and the skill must not become general
            skills.append(replace(skill, task_types=types))
        return SkillBank(skills, self.name, self.origin, self.format, self.notes)

    def _check_task_types(self, files: Mapping[str, Path], known: Collection[str]) -> None:
        types = {task_type for skill in self for task_type in skill.task_types}
        faults = []
        for skill in self:
            unknown = sorted(set(skill.task_types) - set(known))
            if not unknown:
                continue
            other = "" if types & set(known) else " (not one of its types is known: a bank for another environment?)"
            faults.append(
                f"{files[skill.name]}: skill {skill.name!r} has unknown task types {unknown}{other}; the environment "
                f"has {sorted(known)}. Correct them, or translate them: +sdar.skills.task_types.{unknown[0]}=[...]"
            )
        if faults:
            raise SkillBankError(*faults)


def bank_names() -> list[str]:
    """Names of the banks that come with the package."""
    return sorted(entry.name for entry in BANKS_DIR.iterdir() if entry.is_dir())


def _find(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if name in bank_names():
        return BANKS_DIR / name
    path = Path(name).expanduser()
    if not path.exists():
        raise SkillBankError(f"skill bank {name!r} is neither one of {bank_names()} nor a folder or JSON file")
    return path
