"""Skill banks of others: whatever is in them, a bank is loaded or refused with the file's name, quickly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdar_verl.skills.bank import SkillBank, SkillBankError
from sdar_verl.skills.skill import MAX_FILE_BYTES, Skill
from tests.support.fuzzing import LONE, TEXTS, VALUES, damaged, mutations, quick

SOUND = b"---\nname: mugs\ndescription: Find mugs.\ntask-types: [clean]\nkeywords: [mug, cup]\n---\nLook in cabinets.\n"
MAPPING = {
    "skill_files": {"general_skills": "general.md", "mugs": "mugs.md"},
    "task_to_skill": {"clean": "mugs"},
    "task_keywords": {"clean": ["mug"]},
}
PRINCIPLES = {
    "general_skills": [{"skill_id": "g1", "title": "t", "principle": "p", "when_to_apply": "always"}],
    "task_specific_skills": {"clean": [{"skill_id": "c1", "title": "t", "principle": "p"}]},
    "common_mistakes": [{"mistake_id": "m1", "description": "d", "why_it_happens": "w", "how_to_avoid": "h"}],
}
# Nine lines that stand for nine to the ninth values.
BOMB = "k0: &a0 [l]\n" + "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


def skill_file(folder: Path, content: bytes) -> Path:
    (folder / "mugs").mkdir(exist_ok=True)
    (folder / "mugs" / "SKILL.md").write_bytes(content)
    return folder


def loaded_or_refused(path: Path) -> SkillBank | None:
    """The bank; None when it was refused as it should be: a SkillBankError that a person can read."""
    try:
        bank = SkillBank.load(path)
    except SkillBankError as error:
        assert str(path) in str(error) or "skill" in str(error)
        assert len(str(error)) < 4000
        return None
    for skill in bank:
        assert all(isinstance(text, str) for text in (skill.name, skill.text, *skill.task_types, *skill.keywords))
        skill.text.encode()  # tokenizers and Parquet need whole characters
    assert len(bank.digest) == 64
    return bank


# ---------------------------------------------------------------- Agent Skills


@quick(150)
@given(content=damaged(SOUND))
def test_a_damaged_skill_file_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    loaded_or_refused(skill_file(tmp_path, content))


@quick(100)
@given(key=st.sampled_from(["name", "description", "task-types", "keywords", "metadata", "other"]), value=VALUES)
def test_any_value_of_any_key_is_read_or_refused(tmp_path: Path, key: str, value: object) -> None:
    front = {"name": "mugs", "description": "d", key: value}
    text = "".join(f"{name}: {json.dumps(item)}\n" for name, item in front.items())  # JSON is YAML
    loaded_or_refused(skill_file(tmp_path, f"---\n{text}---\nLook.\n".encode()))


@pytest.mark.parametrize(
    ("front", "message"),
    [
        (f"name: mugs\nmetadata:\n  {BOMB.rstrip()}\ndescription: *a9", "aliases"),
        ("name: mugs\ndescription: &a [*a]", "aliases"),
        ("name: mugs\ndescription: " + "[" * 5000, "nested more than 8 levels"),
        ("name: mugs\ndescription: 2024-13-45", "month must be in 1..12"),
        ("name: mugs\ndescription: " + "9" * 5000, "not valid YAML"),
        ("name: mugs\ndescription: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("name: mugs\ndescription: !!python/name:os.system", "could not determine a constructor"),
        ("name: mugs\n? [a]\n: b\ndescription: d", "unhashable"),
        ('name: mugs\ndescription: "\\ud800"', "surrogate"),
    ],
    ids=["bomb", "endless", "deep", "date", "digits", "call", "function", "list as key", "surrogate"],
)
def test_hostile_yaml_is_refused_with_the_reason(tmp_path: Path, front: str, message: str) -> None:
    front = front.replace("\nk", "\n  k")
    with pytest.raises(SkillBankError, match=message):
        SkillBank.load(skill_file(tmp_path, f"---\n{front}\n---\nLook.\n".encode()))


def test_a_value_of_any_size_gives_a_short_message(tmp_path: Path) -> None:
    front = f"name: mugs\ndescription: [{', '.join(['[long, list]'] * 1000)}]"
    with pytest.raises(SkillBankError) as caught:
        SkillBank.load(skill_file(tmp_path, f"---\n{front}\n---\nLook.\n".encode()))
    assert len(str(caught.value)) < 400


# ---------------------------------------------------------------- files


def test_a_link_out_of_the_bank_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SOUND)
    bank = tmp_path / "bank"
    (bank / "mugs").mkdir(parents=True)
    link = bank / "mugs" / "SKILL.md"
    link.symlink_to(secret)
    with pytest.raises(SkillBankError, match="leads out of the folder"):
        SkillBank.load(bank)
    link.unlink()
    (bank / "mugs").rmdir()
    (bank / "mugs").symlink_to(skill_file(tmp_path / "bank" / "..", SOUND) / "mugs")
    with pytest.raises(SkillBankError, match="leads out of the folder"):
        SkillBank.load(bank)


def test_shipped_banks_may_be_links_to_an_installers_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_bytes(SOUND)
    (tmp_path / "banks" / "kitchen" / "mugs").mkdir(parents=True)
    (tmp_path / "banks" / "kitchen" / "mugs" / "SKILL.md").symlink_to(tmp_path / "cache")
    monkeypatch.setattr("sdar_verl.skills.bank.BANKS_DIR", tmp_path / "banks")
    assert len(SkillBank.load("kitchen")) == 1


def test_links_within_the_bank_and_to_the_bank_work(tmp_path: Path) -> None:
    bank = skill_file(tmp_path, SOUND.replace(b"mugs", b"cups"))
    (bank / "mugs").rename(bank / "cups")
    (bank / "mugs").mkdir()
    (bank / "mugs" / "text.md").write_bytes(SOUND)
    (bank / "mugs" / "SKILL.md").symlink_to("text.md")
    other = tmp_path.with_name("link")
    other.symlink_to(bank)
    assert len(SkillBank.load(other)) == 2


@pytest.mark.parametrize("file", ["../secret.md", "/etc/hostname", "/proc/self/environ", "link.md"])
def test_a_mapping_cannot_name_files_outside_its_folder(tmp_path: Path, file: str) -> None:
    (tmp_path / "secret.md").write_text("the password")
    bank = tmp_path / "bank"
    bank.mkdir()
    (bank / "link.md").symlink_to(tmp_path / "secret.md")
    (bank / "skill_mapping.json").write_text(json.dumps({"skill_files": {"general_skills": file}}))
    with pytest.raises(SkillBankError, match="leads out of the folder"):
        SkillBank.load(bank)


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "skill_mapping.json").write_text(json.dumps({"skill_files": {"general_skills": "a" * 5000}}))
    with pytest.raises(SkillBankError, match=r"cannot be read.*File name too long"):
        SkillBank.load(tmp_path)


def test_a_file_whose_size_is_not_known_is_read_up_to_the_limit(tmp_path: Path) -> None:
    from sdar_verl.text_files import read_text

    assert os.stat("/proc/self/maps").st_size == 0  # and yet it has thousands of bytes
    with pytest.raises(SkillBankError, match="more than 100"):
        read_text(Path("/proc/self/maps"), 100, fault=SkillBankError)
    with pytest.raises(SkillBankError, match=str(MAX_FILE_BYTES)):
        SkillBank.load(skill_file(tmp_path, SOUND + b"x" * MAX_FILE_BYTES))


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mugs").mkdir()
    file = tmp_path / "mugs" / "SKILL.md"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(file)
    with pytest.raises(SkillBankError):
        SkillBank.load(tmp_path)


# ---------------------------------------------------------------- JSON


@quick(100)
@given(content=mutations(MAPPING))
def test_a_mapping_with_wrong_parts_is_read_or_refused(tmp_path: Path, content: object) -> None:
    for name in ("general.md", "mugs.md"):
        (tmp_path / name).write_text("Look in cabinets.")
    (tmp_path / "skill_mapping.json").write_text(json.dumps(content))
    loaded_or_refused(tmp_path)


@quick(100)
@given(content=mutations(PRINCIPLES))
def test_principles_with_wrong_parts_are_read_or_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / "bank.json").write_text(json.dumps(content))
    loaded_or_refused(tmp_path / "bank.json")


@quick(60)
@given(content=damaged(json.dumps(PRINCIPLES).encode()))
def test_damaged_json_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bank.json").write_bytes(content)
    loaded_or_refused(tmp_path / "bank.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"general_skills": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"general_skills": {' + ", ".join(f'"{i}": 1' for i in range(50_000)) + "}}", "must be a list"),
        (
            json.dumps({"general_skills": [{"skill_id": "a", "title": "t", "principle": "p"}] * 5000}),
            "duplicate skill names",
        ),
    ],
    ids=["deep", "digits", "many names", "many skills"],
)
def test_hostile_json_is_refused_in_time(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bank.json").write_text(content)
    with pytest.raises(SkillBankError, match=message):
        SkillBank.load(tmp_path / "bank.json")


@quick(50)
@given(text=TEXTS)
def test_a_skill_is_text_that_can_be_written(text: str) -> None:
    if LONE in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        with pytest.raises(SkillBankError, match="surrogate"):
            Skill("a", "d", text)
    else:
        assert Skill("a", "d", text).text == text
