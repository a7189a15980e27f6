"""``sdar-verl skills``: what it prints is what a run would do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdar_verl.cli import main
from sdar_verl.skills.bank import SkillBank, bank_names


def run(capsys, *arguments: object) -> tuple[int, str]:
    status = main(["skills", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_list(capsys) -> None:
    status, text = run(capsys, "list")
    assert status == 0 and [line.split()[0] for line in text.splitlines()] == bank_names()
    status, text = run(capsys, "list", "--bank", "alfworld", "--json")
    assert [row["name"] for row in json.loads(text)] == [skill.name for skill in SkillBank.load("alfworld")]


def test_show(capsys) -> None:
    bank = SkillBank.load("alfworld")
    skill = next(iter(bank))
    status, text = run(capsys, "show", skill.name, "--bank", "alfworld")
    assert status == 0 and skill.text in text
    assert all(skill.text in run(capsys, "show", "--bank", "alfworld")[1] for skill in bank)
    status, text = run(capsys, "show", "nothing", "--bank", "alfworld")
    assert status == 2 and "has no skill nothing" in text


def test_match_prints_the_text_that_the_teacher_gets(capsys) -> None:
    words = ("match", "put a mug in desk", "--bank", "alfworld_household", "--task-type", "pick_and_place_simple")
    status, text = run(capsys, *words, "--json")
    found = json.loads(text)
    assert (status, found["skills"], found["no_match"]) == (0, ["mug", "recipe-place"], False)
    assert found["text"].startswith("mug in ")
    assert "mug, recipe-place" in run(capsys, *words)[1]
    assert "none of this task's own" in run(capsys, "match", "nothing", "--bank", "alfworld")[1]
    status, text = run(capsys, *words, "--retrieval", "keywords")
    assert status == 2 and "unknown retrieval rules" in text
    status, text = run(capsys, *words, "--retrieval", "ucb", "--options", '{"ucb": {"top": 2}}', "--json")
    assert len(json.loads(text)["skills"]) == 2


@pytest.mark.parametrize("given", ["{bad", "[1]", '{"keyword": 3}'])
def test_options_of_rules_are_objects(capsys, given: str) -> None:
    with pytest.raises(SystemExit):
        main(["skills", "match", "--bank", "alfworld", "x", "--options", given])
    assert "--options: " in (told := capsys.readouterr().err) and given in told


THEIR_ENV = """
from sdar_verl.envs.base import Step, TextEnv
from sdar_verl.envs.registry import register_env

@register_env("their_env")
class TheirEnv(TextEnv):
    task_types = ("buy", "sell")

    def reset(self, task):
        return Step("begin")

    def step(self, action):
        return Step("end", done=True)
"""


def test_check_tells_a_sound_bank_from_others(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("alfworld")
    status, text = run(capsys, "check", "--bank", "alfworld", "--env", "alfworld", "--json")
    report = json.loads(text)
    assert status == 0 and report["sound"] and report["task_types_without_skill"] == []
    (tmp_path / "mug").mkdir()
    (tmp_path / "mug" / "SKILL.md").write_text("---\nname: mug\ndescription: d\ntask-types: [buy]\n---\nlook\n")
    assert run(capsys, "check", "--bank", tmp_path)[0] == 0
    status, text = run(capsys, "check", "--bank", tmp_path, "--env", "alfworld")
    assert status == 1 and "bank for another environment" in text
    (tmp_path / "their_env.py").write_text(THEIR_ENV)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = run(capsys, "check", "--bank", tmp_path, "--env", "their_env", "--modules", "their_env")
    assert found[0] == 0 and "without a skill of their own: sell" in found[1]
    (tmp_path / "mug" / "SKILL.md").write_text("")
    status, text = run(capsys, "check", "--bank", tmp_path, "--json")
    assert status == 1 and not json.loads(text)["sound"]
