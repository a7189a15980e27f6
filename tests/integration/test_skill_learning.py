"""Skills that a run learns by itself, through verl's own main_ppo on the CPU, killed between writing and judging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sdar_verl.cli import main
from sdar_verl.report import layout
from sdar_verl.rollout.rows import AFTER, BEFORE
from sdar_verl.skills.bank import BANKS_DIR, SkillBank
from tests.support.chat_server import chat_server, says
from tests.support.resumed import back_to_step_one, differing
from tests.support.toy_run import SMALL
from tests.support.verl_run import run_main_ppo

pytestmark = [pytest.mark.integration, pytest.mark.slow]

KIND = "pick_two_obj_and_place"


def test_a_skill_that_helps_is_learned_and_a_resume_judges_what_waited(tmp_path: Path) -> None:
    """The bank has lost what the small policy can read about two objects; the endpoint writes it again."""
    data, bank = tmp_path / "data", tmp_path / "bank"
    made = ["--train", "8", "--validation", "48", "--test", "4", "--task-types", KIND]
    assert main(["prepare", "alfworld", "--generate", *made, "--out", str(data)]) == 0
    shutil.copytree(BANKS_DIR / "alfworld_household", bank)
    shutil.rmtree(bank / "recipe-two")
    (lost,) = (skill for skill in SkillBank.load("alfworld_household") if skill.name == "recipe-two")

    def script(number: int, prompt: str):
        assert KIND in prompt and "Attempt 1." in prompt
        return says(json.dumps({"name": "two-of-them", "description": "Steps for two objects.", "text": lost.text}))

    with chat_server(script) as server:
        arguments = [
            *SMALL,
            f"data.train_files={data}/train.parquet",
            f"data.val_files={data}/test.parquet",
            "trainer.total_training_steps=2",
            "trainer.test_freq=1",
            "trainer.save_freq=1",
            "sdar.env.max_steps=12",
            f"sdar.skills.bank={bank}",
            "sdar.skills.max_tokens=64",
            "sdar.skills.learn.every=1",
            f"sdar.skills.learn.panel={data}/validation.parquet",
            "sdar.context.writer.source=endpoint",
            "sdar.context.writer.model=toy",
            f"sdar.context.writer.url={server.url}",
        ]
        run = run_main_ppo(tmp_path, arguments)
        first, second = run.metrics[1], run.metrics[2]
        assert first["sdar/skills/version"] == 0 and first["sdar/skills/candidates"] == 1
        assert first["sdar/skills/tokens"] == 7
        rise = first[f"sdar-val/{AFTER}/success"] - first[f"sdar-val/{BEFORE}/success"]
        folder = tmp_path / "checkpoints"
        file = folder / layout.RECORD / layout.SKILLS_FILE
        lines = layout.read_lines(file)
        assert lines[0]["gain"] == pytest.approx(rise) and lines[0]["tasks"] == 48
        assert lines[0]["low"] > 0 and lines[0]["taken"] is True, lines[0]
        assert "two-of-them" in {skill.name for skill in SkillBank.load(folder / "skills" / "version_1")}
        # From the next step on every teacher is shown it; written again as it is, it waits for nothing.
        assert second["sdar/skills/version"] == second["sdar/skills/learned"] == 1
        assert second["sdar/skill_episodes/two-of-them"] == 16 and "sdar/skill_episodes/two-of-them" not in first
        assert second["sdar/skills/candidates"] == 0 and len(lines) == 1
        assert f"sdar-val/{BEFORE}/success" not in second

        back_to_step_one(tmp_path)
        asked = len(server.requests)
        resumed = run_main_ppo(tmp_path, arguments)
    assert set(resumed.metrics) == {1, 2}, "what waited is judged before the training goes on"
    assert resumed.metrics[1][f"sdar-val/{AFTER}/success"] == first[f"sdar-val/{AFTER}/success"]
    assert differing(second, resumed.metrics[2]) == ["sdar/skills/tokens"], "what was paid for is not paid again"
    assert layout.read_lines(file) == lines and len(server.requests) == asked
