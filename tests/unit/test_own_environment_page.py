"""The part of docs/environments.md about an environment of one's own, executed, with the rule of docs/skills.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "environments.md").read_text().split("## Your own")[1]
RULE = (ROOT / "docs" / "skills.md").read_text().split("## Your own rule")[1]

SCRIPT = """
import sys
from sdar_verl.compose import compose_config
from sdar_verl.config import load_config
from sdar_verl.checks.run import check_run

for overrides in sys.argv[1:]:
    config = compose_config("sdar_alfworld", overrides.split())
    check_run(config, load_config(config.sdar))
    print("sound", config.sdar.env.name, config.sdar.skills.retrieval)
"""


def block(page: str, language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)[number]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "VERL_PLATFORM": "cpu"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True)


def test_the_pages_environment_panel_template_and_rule_pass_the_checks_of_a_run(tmp_path):
    (tmp_path / "my_envs.py").write_text(block(PAGE, "python"))
    (tmp_path / "my_rules.py").write_text(block(RULE, "python"))
    (tmp_path / "guess.jinja").write_text(block(PAGE, "jinja"))
    skill = tmp_path / "my_bank" / "middle" / "SKILL.md"
    skill.parent.mkdir(parents=True)
    skill.write_text("---\nname: middle\ndescription: where to begin\n---\nBegin in the middle.\n")
    panels = run(tmp_path, "-c", block(PAGE, "python", 1))
    assert panels.returncode == 0, panels.stderr
    command = re.search(r"--config-name sdar_alfworld \\\n(.*?)\n\n", PAGE, re.DOTALL).group(1)
    overrides = command.replace("\\\n", " ").replace("'", "").split()
    rule = re.search(r"^    (sdar\.modules=\[my_rules\].*)$", RULE, re.MULTILINE).group(1).split()
    # One list names the modules of both pages.
    given = [word for word in (*overrides, *rule) if not word.startswith("sdar.modules=")]
    sound = [*given, "sdar.modules=[my_envs,my_rules]", "hardware=cpu"]
    kept = [*(word for word in overrides if not word.startswith("~")), "hardware=cpu"]
    done = run(tmp_path, "-c", SCRIPT, " ".join(sound), " ".join(kept))
    assert "sound guess ['longest']" in done.stdout, done.stdout + done.stderr
    assert "left out with ~sdar.env.options.success_reward" in done.stderr, done.stderr


def test_the_pages_template_shows_what_it_says(tmp_path):
    from sdar_verl.rollout.prompts import PromptTemplate

    (tmp_path / "guess.jinja").write_text(block(PAGE, "jinja"))
    template = PromptTemplate.load(tmp_path / "guess.jinja")
    said = {"task": "find it", "observation": "No.", "admissible_actions": ["1"], "step": 2, "max_steps": 9}
    history = [{"observation": "Say a digit.", "action": "1"}]
    student = template.render(skills="", history=history, **said)
    teacher = template.render(skills="Begin in the middle.", history=history, **said)
    assert "You said 1, after: Say a digit." in student and "help" not in student
    assert teacher.replace("What may help:\nBegin in the middle.\n", "") == student
