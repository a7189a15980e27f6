"""What validation arms of a recipe of verl's put into the student's prompt."""

from __future__ import annotations

from pathlib import Path

from sdar_verl.compose import compose_config
from sdar_verl.rollout.recipe_rows import task_of
from sdar_verl.verl.recipe_prompts import RecipeRuntime
from tests.support.chatml import qwen_like_tokenizer
from tests.support.recipe_run import recipe_arguments, word_problems


def test_an_arm_with_skills_shows_skills_and_not_the_solution(tmp_path: Path) -> None:
    (tmp_path / "bank" / "sums").mkdir(parents=True)
    skill = "---\nname: sums\ndescription: How to add.\n---\nAdd the smaller to the larger.\n"
    (tmp_path / "bank" / "sums" / "SKILL.md").write_text(skill)
    overrides = [
        *("sdar.context.sources=[skills,column]", "+sdar.context.options.column.path=extra_info.answer"),
        *(f"sdar.skills.bank={tmp_path}/bank", "sdar.skills.retrieval=[full]"),
    ]
    config = compose_config("sdar_ppo", recipe_arguments(tmp_path, *overrides, model=tmp_path))
    runtime = RecipeRuntime(config, qwen_like_tokenizer(), "qwen2")
    row = word_problems(1)[0]
    task = task_of({**row, "raw_prompt": row["prompt"]})
    solution = row["extra_info"]["answer"]
    assert runtime.shown(task, "none") == ""
    assert "the larger" in runtime.shown(task, "skills") and solution not in runtime.shown(task, "skills")
    assert "the larger" in runtime.shown(task, "teacher") and solution in runtime.shown(task, "teacher")
