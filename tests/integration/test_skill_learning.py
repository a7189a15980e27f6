"""Skills that a run learns by itself, through verl's own main_ppo on the CPU, killed between writing and judging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdar_verl.envs.base import Task
from sdar_verl.panels import write_panel
from sdar_verl.report import layout
from sdar_verl.rollout.rows import AFTER, BEFORE
from sdar_verl.skills.bank import SkillBank
from tests.support.chat_server import chat_server, says
from tests.support.resumed import back_to_step_one, differing
from tests.support.toy_run import SMALL, train

pytestmark = [pytest.mark.integration, pytest.mark.slow]

KIND = "pick_and_place_simple"


def test_a_skill_that_helps_is_learned_and_a_resume_judges_what_waited(tmp_path: Path) -> None:
    """The mug is on the desk: the small policy can read that, and goes there at its first and only turn."""
    panel = tmp_path / "third.parquet"
    mugs = [
        Task("toy_search", f"third-{i}", KIND, "put some mug in fridge", data={"place": "desk 1"}) for i in range(24)
    ]
    write_panel(mugs, panel, "third")

    def script(number: int, prompt: str):
        assert KIND in prompt and "Attempt 1." in prompt
        return says(json.dumps({"name": "mug-place", "description": "Where the mug is.", "text": "mug in desk ."}))

    with chat_server(script) as server:
        arguments = [
            "sdar.env.max_steps=1",
            "sdar.skills.learn.every=1",
            f"sdar.skills.learn.panel={panel}",
            "sdar.skills.max_tokens=100",
            "sdar.context.writer.source=endpoint",
            "sdar.context.writer.model=toy",
            f"sdar.context.writer.url={server.url}",
            *("trainer.test_freq=1", "trainer.save_freq=1", "sdar.update.mini_batch_rows=16"),
        ]
        run = train(tmp_path, *arguments, base=SMALL, steps=2)
        first, second = run.metrics[1], run.metrics[2]
        assert first["sdar/skills/version"] == 0 and first["sdar/skills/candidates"] == 1
        assert first["sdar/skills/tokens"] == 7
        rise = first[f"sdar-val/{AFTER}/success"] - first[f"sdar-val/{BEFORE}/success"]
        folder = tmp_path / "checkpoints"
        file = folder / layout.RECORD / layout.SKILLS_FILE
        lines = layout.read_lines(file)
        assert lines[0]["gain"] == pytest.approx(rise) and lines[0]["tasks"] == 24
        assert lines[0]["low"] > 0 and lines[0]["taken"] is True, lines[0]
        assert second["sdar/skills/version"] == second["sdar/skills/learned"] == 1
        # With the bank that has it, the arm without what was written is as good as the one with it was.
        assert second[f"sdar-val/{BEFORE}/success"] > first[f"sdar-val/{BEFORE}/success"]
        assert "mug in desk ." in {skill.text for skill in SkillBank.load(folder / "skills" / "version_1")}
        assert second["sdar/skill_episodes/mug-place"] == 16, "the teacher is shown it from the next step on"

        back_to_step_one(tmp_path)
        asked = len(server.requests)
        resumed = train(tmp_path, *arguments, base=SMALL, steps=2)
    assert set(resumed.metrics) == {1, 2}, "what waited is judged before the training goes on"
    assert differing(second, resumed.metrics[2]) == []
    assert layout.read_lines(file) == lines and len(server.requests) == asked
