"""Skill banks in the two JSON formats: told by their content, with every fault named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdar_verl.skills.bank import Skill, SkillBank, SkillBankError

MAPPING = {
    "skill_files": {"general_skills": "all.md", "heat": "heat.md", "look_up": "look.md"},
    "task_to_skill": {"warm": "heat", "boil": "heat", "lookup": "look_up"},
    "task_keywords": {"warm": ["warm up", "hot"], "boil": ["hot", "boil"]},
}
FILES = {"all.md": "# In general\nlook first\n", "heat.md": "use the stove", "look.md": "use a lamp"}
PRINCIPLES = {
    "general_skills": [
        {"skill_id": "gen_001", "title": "Order", "principle": "one by one", "when_to_apply": "at the start"}
    ],
    "task_specific_skills": {"warm": [{"skill_id": "w_1", "title": "Stove", "principle": "turn it on"}]},
    "common_mistakes": [
        {"mistake_id": "err_001", "description": "runs", "why_it_happens": "haste", "how_to_avoid": "walk"}
    ],
    "metadata": {"whatever": 1},
}


def write_mapping(folder: Path, mapping: Any = MAPPING, files: dict[str, str] = FILES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "skill_mapping.json").write_text(mapping if isinstance(mapping, str) else json.dumps(mapping))
    return folder


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_mapping_is_read_from_its_folder_or_its_file(tmp_path: Path) -> None:
    bank = SkillBank.load(write_mapping(tmp_path))
    assert list(bank) == [
        Skill("general-skills", "In general", "# In general\nlook first"),
        Skill("heat", "use the stove", "use the stove", ("warm", "boil"), ("warm up", "hot", "boil")),
        Skill("look-up", "use a lamp", "use a lamp", ("lookup",)),
    ]
    assert bank.format == "skill_mapping.json"
    assert SkillBank.load(tmp_path / "skill_mapping.json").digest == bank.digest


@pytest.mark.parametrize("key", ["task_specific_skills", "query_type_skills"])
def test_each_principle_of_skillrl_becomes_a_skill(tmp_path: Path, key: str) -> None:
    content = {**PRINCIPLES}
    content[key] = content.pop("task_specific_skills")
    bank = SkillBank.load(write_json(tmp_path / "any name.json", content))
    assert list(bank) == [
        Skill("err-001", "runs", "Mistake: runs\nCause: haste\nInstead: walk"),
        Skill("gen-001", "Order", "Order: one by one\nApplies: at the start"),
        Skill("w-1", "Stove", "Stove: turn it on", ("warm",)),
    ]
    assert bank.format == "SkillRL"
    assert [skill.name for skill in bank.specific] == ["w-1"]


def changed(**changes: Any) -> dict[str, Any]:
    return {**MAPPING, **changes}


@pytest.mark.parametrize(
    ("mapping", "files", "message"),
    [
        ("{", FILES, "not valid JSON"),
        (MAPPING, {**FILES, "heat.md": " \n"}, r"heat\.md has no text"),
        (changed(skill_files={**MAPPING["skill_files"], "heat": "nowhere.md"}), FILES, r"nowhere\.md is missing"),
        (changed(skill_files={"general_skills": "all.md"}), FILES, r"task_to_skill names the skills \['heat', 'lo"),
        (changed(task_keywords={"fly": ["wing"]}), FILES, r"task_keywords has the task types \['fly'\]"),
        (changed(task_keywords={"warm": "hot"}), FILES, r"task_keywords\.warm must be a list"),
        (changed(task_keywords={"warm": ["--"]}), FILES, r"task_keywords\.warm must be words"),
        (changed(task_to_skill={"warm": "heat"}, task_keywords={}), FILES, "'look_up' is for no task type"),
        (changed(skill_files=["heat.md"]), FILES, "skill_files must be an object"),
        (changed(skill_files={**MAPPING["skill_files"], "heat": 7}), FILES, r"skill_files\.heat must be text, not 7"),
        (changed(skill_files={"heat": "heat.md", "HEAT": "heat.md"}, task_to_skill={"warm": "heat", "x": "HEAT"},
                 task_keywords={}), FILES, r"duplicate skill names \['heat', 'HEAT'\]"),
        ('{"skill_files": {"a": "x.md", "a": "y.md"}}', FILES, r"duplicate names \['a'\]"),
    ],
)  # fmt: skip
def test_faults_of_a_mapping_are_named(tmp_path: Path, mapping: Any, files: dict[str, str], message: str) -> None:
    write_mapping(tmp_path, mapping, files)
    with pytest.raises(SkillBankError, match=message):
        SkillBank.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"skills": []}, "is no skill bank: it has"),
        ([1], "is no skill bank: it has list"),
        ({"general_skills": {}}, "general_skills must be a list"),
        ({"general_skills": []}, "empty"),
        ({"task_specific_skills": []}, "task_specific_skills must be an object"),
        ({"general_skills": ["walk"]}, r"general_skills\[0\]\.title must be text, not None"),
        ({"general_skills": [{"skill_id": "a", "title": "t", "principle": " "}]}, r"general_skills\[0\]\.principle"),
        ({"general_skills": 2 * [{"skill_id": "a", "title": "t", "principle": "p"}]}, r"duplicate skill names \['a'\]"),
        ({"general_skills": [{"skill_id": "--", "title": "t", "principle": "p"}]}, "no letter or digit"),
        ({"common_mistakes": [{"mistake_id": "e", "description": "d"}]}, r"common_mistakes\[0\]\.why_it_happens"),
    ],
)
def test_faults_of_a_list_of_principles_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(SkillBankError, match=message):
        SkillBank.load(write_json(tmp_path / "bank.json", content))


def test_a_folder_that_could_be_two_banks_is_refused(tmp_path: Path) -> None:
    write_mapping(tmp_path)
    (tmp_path / "heat").mkdir()
    (tmp_path / "heat" / "SKILL.md").write_text("---\nname: heat\ndescription: d\n---\ntext")
    with pytest.raises(SkillBankError, match="not clear which"):
        SkillBank.load(tmp_path)


def test_a_folder_with_another_json_file_says_how_to_name_it(tmp_path: Path) -> None:
    file = write_json(tmp_path / "claude.json", PRINCIPLES)
    with pytest.raises(SkillBankError, match=f"sdar.skills.bank={file}"):
        SkillBank.load(tmp_path)


def test_task_types_are_translated_and_then_checked(tmp_path: Path) -> None:
    write_mapping(tmp_path)
    with pytest.raises(SkillBankError, match=r"unknown task types .*another environment.*sdar\.skills\.task_types"):
        SkillBank.load(tmp_path, task_types=("hot", "light"))
    renamed = {"warm": ["hot"], "boil": ["hot"], "lookup": []}
    bank = SkillBank.load(tmp_path, task_types=("hot", "light"), renamed=renamed)
    # The one without a type left, and without keywords, is gone: it must not become general.
    assert [(skill.name, skill.task_types) for skill in bank] == [("general-skills", ()), ("heat", ("hot",))]
    with pytest.raises(SkillBankError, match=r"\['cool'\] are renamed.*no skill"):
        SkillBank.load(tmp_path, renamed={"cool": ["hot"]})


def test_aliases_are_used_for_foreign_names_only(tmp_path: Path) -> None:
    write_mapping(tmp_path)
    aliases = {"warm": ("other",), "boil": ("warm", "hot"), "lookup": ("light",), "unused": ("x",)}
    bank = SkillBank.load(tmp_path, task_types=("warm", "hot", "light"), aliases=aliases)
    assert {skill.name: skill.task_types for skill in bank if skill.task_types} == {
        "heat": ("warm", "hot"),
        "look-up": ("light",),
    }


def test_alfworld_knows_the_names_that_the_published_banks_use(tmp_path: Path) -> None:
    pytest.importorskip("alfworld")
    from sdar_verl.config import SkillsConfig
    from sdar_verl.skills.loading import load_run_bank

    published = ("pick_and_place", "look_at_obj_in_light", "clean", "heat", "cool", "examine")
    principle = {"title": "t", "principle": "p"}
    content = {"task_specific_skills": {name: [{"skill_id": name, **principle}] for name in published}}
    file = write_json(tmp_path / "bank.json", content)
    bank = load_run_bank(SkillsConfig(bank=str(file)), "alfworld")
    from sdar_verl.envs.alfworld.spec import TASK_TYPES

    assert {task_type for skill in bank for task_type in skill.task_types} == set(TASK_TYPES)
    content["task_specific_skills"]["fly"] = [{"skill_id": "f", **principle}]
    write_json(file, content)
    with pytest.raises(SkillBankError, match=r"unknown task types \['fly'\]"):
        load_run_bank(SkillsConfig(bank=str(file)), "alfworld")
