"""Skill banks: loading, validation, content hash, and the shipped ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sdar_verl.cli import main
from sdar_verl.envs.base import Task
from sdar_verl.envs.search.questions import TASK_TYPES as WORLD_TASK_TYPES
from sdar_verl.skills.bank import MAX_FILE_BYTES, Skill, SkillBank, SkillBankError, bank_names
from sdar_verl.skills.formats import MAX_FRONT_MATTER
from sdar_verl.skills.retrieval import retrieve

ALFWORLD_TASK_TYPES = {
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
}
GOOD = """---
name: heat
description: Heat things.
task-types: [warm]
keywords: [hot, AlarmClock]
---
Use the microwave.
"""


def write_skill(bank: Path, content: str | bytes, folder: str = "heat") -> Path:
    path = bank / folder / "SKILL.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_load(tmp_path: Path) -> None:
    write_skill(tmp_path, GOOD)
    write_skill(
        tmp_path, "---\nname: a-general-one\ndescription: d\nlicense: MIT\n---\ntext\n---\nmore", "a-general-one"
    )
    (tmp_path / "README.md").write_text("not a skill")
    (tmp_path / ".git").mkdir()
    general, heat = SkillBank.load(tmp_path, task_types={"warm"})
    assert heat == Skill("heat", "Heat things.", "Use the microwave.", ("warm",), ("hot", "AlarmClock"))
    assert general == Skill("a-general-one", "d", "text\n---\nmore")
    assert general.general and not heat.general


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Use the microwave.", "no front matter"),
        ("---\nname: heat\ndescription: d\nUse the microwave.", "no front matter"),
        (GOOD.replace("Use the microwave.", "  "), "no text"),
        (GOOD.replace("name: heat\n", ""), "'name' must be text, not None"),
        (GOOD.replace("Heat things.", ""), "'description' must be text, not None"),
        (GOOD.replace("Heat things.", "7"), "'description' must be text, not 7"),
        (GOOD.replace("keywords", "name: cool\nkeywords"), "'name' stands there twice"),
        (GOOD.replace("Heat things.", "Use when: hot"), "put a value that holds ': ' in quotes"),
        (GOOD.replace("[warm]", "[warm"), "not valid YAML"),
        (GOOD.replace("[warm]", "!!bool maybe"), "not valid YAML"),
        (GOOD.replace("[warm]", "!!int ''"), "not valid YAML"),
        (GOOD.replace("[warm]", "!!timestamp soon"), "not valid YAML"),
        (GOOD.replace("[hot, AlarmClock]", "7"), "'keywords' must be a list of words, not 7"),
        (GOOD.replace("[hot, AlarmClock]", "no"), "'keywords' must be a list of words, not False; quote"),
        (GOOD.replace("[hot, AlarmClock]", "0"), "'keywords' must be a list of words, not 0; quote"),
        (GOOD.replace("name: heat\n", "name: no\n"), "'name' must be text, not False; quote numbers, yes, no"),
        ("---\nname: heat\nnotes: " + "x" * MAX_FRONT_MATTER + "\n---\ntext", "more than 20000 characters"),
        (GOOD.replace("[hot, AlarmClock]", "[no]"), r"not \[False\]; quote"),
        (GOOD.replace("[hot, AlarmClock]", "['--']"), "'keywords' must be a list of words"),
        ("---\n- name\n---\ntext", "front matter must be"),
        ("---\nname: !!python/object:os.system x\ndescription: d\n---\ntext", "not valid YAML"),
        (GOOD.encode() + b"\xff\xfe", "not UTF-8"),
        (GOOD + "x" * MAX_FILE_BYTES, f"more than {MAX_FILE_BYTES}"),
    ],
)
def test_faulty_files_are_refused_by_name(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write_skill(tmp_path, content)
    with pytest.raises(SkillBankError, match=message) as error:
        SkillBank.load(tmp_path)
    assert str(path) in str(error.value)


WILD = """---
name: heat-things
description: Heat.
homepage: https://example.org
when_to_use: always
user-invocable: true
keyword: hot
Task_Types: [warm]
keywords: hot, Alarm Clock
---
"""


def test_a_bank_of_others_loads_and_says_what_means_nothing(tmp_path: Path) -> None:
    """Keys as skills in the wild have them, a name that is not the folder's, 300,000 characters of text."""
    write_skill(tmp_path, WILD + "Use the microwave. " * 16_000)
    write_skill(tmp_path, GOOD.replace("name: heat", "name: cool\nhomepage: x"), "cool")
    bank = SkillBank.load(tmp_path)
    cool, heat = bank
    assert (heat.name, heat.keywords, heat.task_types) == ("heat", ("hot", "Alarm Clock"), ())
    assert len(heat.text) > 300_000
    assert cool.task_types == ("warm",)
    assert [note.partition("front matter: ")[2] or note for note in bank.notes] == [
        f"{tmp_path}/heat/SKILL.md: name 'heat-things' differs from the folder's, which is the one that counts",
        "key 'Task_Types' of 1 skill means nothing here; task-types is meant?",
        "key 'homepage' of 2 skills means nothing here",
        "key 'keyword' of 1 skill means nothing here; keywords is meant?",
        "key 'user-invocable' of 1 skill means nothing here",
        "key 'when_to_use' of 1 skill means nothing here",
    ]
    assert SkillBank.load(tmp_path, renamed={"warm": ["hot"]}).notes == bank.notes


def test_a_file_in_another_place_or_case_is_named(tmp_path: Path) -> None:
    write_skill(tmp_path / "kitchen", GOOD)
    write_skill(tmp_path, GOOD, "low").rename(tmp_path / "low" / "skill.md")
    with pytest.raises(SkillBankError) as error:
        SkillBank.load(tmp_path)
    kitchen, low = error.value.faults
    assert kitchen.endswith("(the folder 'kitchen' is a bank of its own, with heat)")
    assert low.endswith("(rename skill.md)")


def test_one_skill_is_no_bank(tmp_path: Path) -> None:
    """With and without the folders that a skill may have, and named by its file."""
    for name, further in (("heat", ()), ("wash", ("scripts", "references"))):
        folder = tmp_path / "skills" / name
        for sub in (folder, *(folder / sub for sub in further)):
            sub.mkdir(parents=True)
        (folder / "SKILL.md").write_text(f"---\nname: {name}\ndescription: d\n---\ntext\n")
        for given in (folder, folder / "SKILL.md"):
            with pytest.raises(
                SkillBankError, match=rf"{given} is one skill; a bank is .*: {tmp_path}/skills\. Put it"
            ):
                SkillBank.load(given)
    assert len(SkillBank.load(tmp_path / "skills")) == 2


def test_folders_beside_the_skills_are_passed_over_by_name(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    with pytest.raises(SkillBankError, match=r"assets/SKILL\.md is missing"):
        SkillBank.load(tmp_path)
    write_skill(tmp_path, GOOD)
    bank = SkillBank.load(tmp_path)
    assert [skill.name for skill in bank] == ["heat"]
    assert list(bank.notes) == [f"{tmp_path}/assets holds no SKILL.md: passed over"]


def test_what_means_the_same_is_no_fault(tmp_path: Path) -> None:
    """A blank line before the front matter, a title as name beside a folder's valid one, a key without a value."""
    write_skill(tmp_path, "\n\n" + GOOD.replace("name: heat", "name: Heat It Up").replace("[warm]", ""))
    bank = SkillBank.load(tmp_path)
    assert [(skill.name, skill.task_types, skill.text) for skill in bank] == [("heat", (), "Use the microwave.")]
    assert "name 'Heat It Up' differs from the folder's" in bank.notes[0]


def test_every_fault_of_a_bank_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_skill(tmp_path, "no front matter", "a")
    write_skill(tmp_path, "---\nname: B b\nkeywords: [no]\n---\n", "b_")
    write_skill(tmp_path, GOOD, "heat")
    write_skill(tmp_path, GOOD.replace("heat", "cool").replace("warm", "cold"), "cool")
    with pytest.raises(SkillBankError) as error:
        SkillBank.load(tmp_path, task_types={"other"})
    expected = [
        r"a/SKILL\.md has no front matter",
        r"b_/SKILL\.md: 'description' must be text",
        r"b_/SKILL\.md: name 'B b' must be at most 64 lower-case",
        r"b_/SKILL\.md has no text",
        r"b_/SKILL\.md: 'keywords' must be a list of words",
        r"cool/SKILL\.md: skill 'cool' has unknown task types \['cold'\]",
        r"heat/SKILL\.md: skill 'heat' has unknown task types \['warm'\]",
    ]
    assert len(error.value.faults) == len(expected)
    for fault, pattern in zip(error.value.faults, expected, strict=True):
        assert re.search(pattern, fault)
    assert main(["skills", "check", "--bank", str(tmp_path), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 5


def test_every_fault_of_a_json_bank_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "fine.md").write_text("text")
    mapping = {"skill_files": {"a": "gone.md", "b": "none.md", "general_skills": "fine.md", "c": "fine.md"}}
    mapping |= {"task_to_skill": {"x": "a", "y": "b", "z": "nowhere"}, "task_keywords": {"w": []}}
    (tmp_path / "skill_mapping.json").write_text(json.dumps(mapping))
    with pytest.raises(SkillBankError) as error:
        SkillBank.load(tmp_path)
    assert len(error.value.faults) == 5  # names a skill, names a type, two files, one that is for nothing
    principles = {"general_skills": [{"title": "T"}, {"skill_id": "g", "title": "T", "principle": "P"}, 7]}
    (tmp_path / "principles.json").write_text(json.dumps(principles))
    with pytest.raises(SkillBankError) as error:
        SkillBank.load(tmp_path / "principles.json")
    assert len(error.value.faults) == 2


def test_unknown_task_type_names_file_and_known_ones(tmp_path: Path) -> None:
    path = write_skill(tmp_path, GOOD)
    with pytest.raises(SkillBankError, match=r"unknown task types \['warm'\].*\['cold'\]") as error:
        SkillBank.load(tmp_path, task_types={"cold"})
    assert str(path) in str(error.value)


def test_missing_pieces(tmp_path: Path) -> None:
    with pytest.raises(SkillBankError, match=r"'nowhere' is neither one of .*alfworld_household.* nor a folder"):
        SkillBank.load("nowhere")
    with pytest.raises(SkillBankError, match="empty"):
        SkillBank.load(tmp_path)
    (tmp_path / "heat").mkdir()
    with pytest.raises(SkillBankError, match=r"heat.SKILL\.md is missing"):
        SkillBank.load(tmp_path)


def test_duplicate_names() -> None:
    with pytest.raises(SkillBankError, match=r"duplicate skill names \['a'\]"):
        SkillBank([Skill("a", "", "x"), Skill("b", "", "y"), Skill("a", "", "z")])


def test_digest_follows_content_only(tmp_path: Path) -> None:
    write_skill(tmp_path / "unix", GOOD)
    write_skill(tmp_path / "windows", b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    write_skill(tmp_path / "other", GOOD.replace("microwave", "stove"))
    unix, windows, other = (SkillBank.load(tmp_path / name).digest for name in ("unix", "windows", "other"))
    assert unix == windows
    assert unix != other
    skills = [Skill("a", "", "x"), Skill("b", "", "y")]
    assert SkillBank(skills).digest == SkillBank(skills[::-1]).digest


@pytest.mark.parametrize("name", [name for name in bank_names() if name.startswith("alfworld")])
def test_shipped_alfworld_banks_have_one_skill_for_every_task_type(name: str) -> None:
    bank = SkillBank.load(name, task_types=ALFWORLD_TASK_TYPES)
    assert sorted(task_type for skill in bank for task_type in skill.task_types) == sorted(ALFWORLD_TASK_TYPES)


# Search-R1's data sets, and what the invented world asks.
SEARCH_TASK_TYPES = (
    "nq",
    "triviaqa",
    "popqa",
    "hotpotqa",
    "2wikimultihopqa",
    "musique",
    "bamboogle",
    *WORLD_TASK_TYPES,
)


def test_the_search_bank_has_one_skill_for_every_data_set_and_kind_of_question() -> None:
    bank = SkillBank.load("search", task_types=SEARCH_TASK_TYPES)
    assert sorted(task_type for skill in bank for task_type in skill.task_types) == sorted(SEARCH_TASK_TYPES)


@pytest.mark.parametrize(
    ("question", "task_type", "specific"),
    [
        ("Who was born earlier, Orrin Takk or Lia Vey?", "comparison", ["comparing"]),
        ("Which river is longer, the Maval River or the Ossel River?", "hotpotqa", ["comparing", "chains"]),
        ("When was the oratory of Lumeth finished?", "nq", ["dates-and-numbers", "single-fact"]),
        (
            "How many kilometres long is the river that flows through Kovaen?",
            "two_hop",
            ["dates-and-numbers", "chains"],
        ),
        ("Who founded Kovaen?", "one_hop", ["single-fact"]),
    ],
)
def test_search_skills_are_picked_by_words_of_the_question_and_its_data_set(question, task_type, specific) -> None:
    found = retrieve(SkillBank.load("search"), Task("search", "t", task_type, question), ["keyword", "task_type"])
    assert list(found.names) == [*specific, "answer-form", "queries", "reading", "turns"]


def test_household_bank_keeps_the_form_that_the_tiny_policy_was_trained_on() -> None:
    for skill in SkillBank.load("alfworld_household"):
        if skill.keywords:
            assert [keyword.lower() for keyword in skill.keywords] == [skill.name]
            assert re.fullmatch(rf"{skill.name} in [a-z]+ \.", skill.text)
        else:
            assert re.fullmatch(r"find it , take it , [a-z ,]+ \.", skill.text)
