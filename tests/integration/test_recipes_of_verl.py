"""Recipes that are not ours: verl's agent loops, data and rewards through ``sdar_ppo``; main_ppo, two steps each."""

from __future__ import annotations

import json

import pytest

from sdar_verl.report.read import read_run
from tests.support.calculator import CONFIG
from tests.support.chat_server import chat_server, says
from tests.support.recipe_run import recipe_arguments, train_recipe, word_problems
from tests.support.verl_run import Run, run_main_ppo

OWN_LOOPS = [
    "sdar.modules=[tests.support.agent_loops]",
    "actor_rollout_ref.rollout.agent.default_agent_loop={}",
    "sdar.context.sources=[answer]",
]


def own(name: str) -> list[str]:
    return [item.format(name) for item in OWN_LOOPS]


def sound(run: Run) -> None:
    """Two updates were made with a teacher that saw the student's rows."""
    for step in (1, 2):
        metrics = run.metrics[step]
        assert metrics["sdar/context_share"] > 0
        assert abs(metrics["sdar/gap_mean"]) > 0
        assert 0 < metrics["sdar/gate_mean"] < 1
        assert metrics["actor/grad_norm"] > 0


def test_a_single_turn_script_with_two_flags(tmp_path):
    """verl's single_turn_agent and its own reward of GSM8K; the teacher sees the answer, an arm validates with it."""
    run = train_recipe(
        tmp_path,
        "sdar.context.sources=[answer]",
        "trainer.test_freq=2",
        "+sdar.validation.arms.teacher={context: teacher, temperature: 0.0}",
        "sdar.validation.arms.student.temperature=1.0",
        "sdar.trace.every=1",
    )
    sound(run)
    assert run.metrics[1]["sdar/empty_context_gap"] < 1e-3
    validated = run.metrics[2]
    assert any(name.startswith("val-core/openai/gsm8k/") for name in validated), "verl's own are as they were"
    for arm in ("teacher", "student"):
        assert any(name.startswith(f"val-core/openai/gsm8k/{arm}/") for name in validated)
    outcomes = read_run(run.folder).outcomes[2]
    assert set(outcomes["arm"]) == {"verl", "teacher", "student"}
    for arm in ("verl", "teacher", "student"):
        tasks = [task for name, task in zip(outcomes["arm"], outcomes["task_id"], strict=True) if name == arm]
        assert len(tasks) == len({*tasks}) > 1 and tasks[0].startswith("openai/gsm8k/")


@pytest.mark.slow
def test_a_tool_agent_with_tools_of_a_yaml(tmp_path):
    """Tool schemas stand in both prompts; the context of a sibling is made when the group has ended."""
    tools = tmp_path / "tools.yaml"
    tools.write_text(CONFIG)
    run = train_recipe(
        tmp_path / "run",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
        "actor_rollout_ref.rollout.multi_turn.enable=True",
        f"actor_rollout_ref.rollout.multi_turn.tool_config_path={tools}",
        "sdar.context.sources=[sibling]",
        "+sdar.context.options.sibling.threshold=-1.0",
    )
    assert run.metrics[2]["actor/grad_norm"] >= 0
    assert run.metrics[1]["sdar/context_share"] > 0


@pytest.mark.slow
def test_a_column_of_the_data_chooses_the_teacher(tmp_path):
    """Half of the rows are taught by the answer, the others by a better rollout of the same prompt."""
    rows = word_problems(8)
    for number, row in enumerate(rows):
        row["extra_info"] = {**row["extra_info"], "kind": ("told", "shown")[number % 2]}
    run = train_recipe(
        tmp_path,
        "sdar.context.sources=[answer,sibling]",
        "+sdar.context.options.sibling.threshold=-1.0",
        "sdar.context.teachers.by=extra_info.kind",
        "+sdar.context.teachers.choice={told: answer, shown: sibling}",
        "data.shuffle=False",
        rows=rows,
    )
    sound(run)
    shares = [run.metrics[1][f"sdar/teachers/{name}/share"] for name in ("answer", "sibling")]
    assert sum(shares) == pytest.approx(1.0) and min(shares) > 0


@pytest.mark.slow
def test_a_loop_of_the_users_with_several_outputs(tmp_path):
    run = train_recipe(tmp_path, *own("two_drafts"), "algorithm.adv_estimator=sdar")
    sound(run)
    assert run.metrics[1]["sdar/rows"] == 2 * 16


@pytest.mark.slow
def test_a_loop_that_calls_the_chat_template_itself(tmp_path):
    run = train_recipe(tmp_path, *own("own_template"))
    sound(run)
    assert run.metrics[1]["sdar/foreign_prompt_share"] == 0 and run.metrics[1]["sdar/empty_context_gap"] < 1e-3


@pytest.mark.slow
def test_a_loop_that_gives_the_teachers_prompt(tmp_path):
    sound(train_recipe(tmp_path, *own("own_teacher")))


@pytest.mark.slow
def test_a_prompt_that_verls_tokenisation_does_not_make_is_told(tmp_path):
    arguments = recipe_arguments(tmp_path, *own("own_words"))
    with pytest.raises(AssertionError) as failed:
        run_main_ppo(tmp_path, arguments, config="sdar_ppo")
    assert "own_words" in str(failed.value) and "teacher_prompt_ids" in str(failed.value)


LOOPS = ("single_turn_agent", "tool_agent", "two_drafts", "own_teacher", "own_words", "single_turn_agent")


@pytest.mark.slow
def test_rows_that_name_their_loops(tmp_path):
    """A data set with ``agent_name``: verl's loops and the user's in one run, one of them with prompts that nobody
    else makes, which are left to RL; the context is a column."""
    tools = tmp_path / "tools.yaml"
    tools.write_text(CONFIG)
    rows = [{**row, "agent_name": loop} for row, loop in zip(word_problems(len(LOOPS)), LOOPS, strict=True)]
    run = train_recipe(
        tmp_path / "run",
        "sdar.modules=[tests.support.agent_loops]",
        "sdar.context.sources=[column]",
        "+sdar.context.options.column.path=extra_info.answer",
        "sdar.context.on_foreign_prompt=mask",
        "algorithm.adv_estimator=sdar",
        "actor_rollout_ref.rollout.multi_turn.enable=True",
        f"actor_rollout_ref.rollout.multi_turn.tool_config_path={tools}",
        "data.train_batch_size=3",
        "actor_rollout_ref.actor.ppo_mini_batch_size=3",
        "data.shuffle=False",
        rows=rows,
    )
    sound(run)
    first, second = run.metrics[1], run.metrics[2]
    assert first["sdar/rows"] > 3 * 4, "two_drafts gives two rows an episode"
    assert first["sdar/context_share"] == 1 and first["sdar/foreign_prompt_share"] == 0
    assert second["sdar/rows"] == 3 * 4
    assert second["sdar/foreign_prompt_share"] == pytest.approx(1 / 3)
    assert second["sdar/context_share"] == pytest.approx(2 / 3)


@pytest.mark.slow
def test_the_policy_writes_of_rows_of_verls_own_loop(tmp_path):
    """A lesson per answer, from the same servers; the tiny model writes noise."""
    run = train_recipe(
        tmp_path,
        "sdar.context.sources=[lesson]",
        "+sdar.context.options.lesson.form=text",
        "sdar.context.writer.max_prompt_length=1500",
        "actor_rollout_ref.rollout.max_model_len=1600",
        "sdar.rollout.seed=0",
        "sdar.trace.every=1",
    )
    for step in (1, 2):
        metrics = run.metrics[step]
        assert metrics["sdar/writer/asked"] > 4 and metrics["sdar/writer/failed"] == 0
        assert metrics["sdar/writer/answered"] > 0 and metrics["sdar/context_share"] > 0


@pytest.mark.slow
def test_an_endpoint_gives_hints_to_a_loop_of_several_outputs(tmp_path):
    """Each output is a turn with a row of its own: the hint stands on the second alone."""
    answer = json.dumps({"hints": [{"turn": 2, "hint": "Add both numbers."}]})
    with chat_server(lambda *_: says(answer)) as server:
        run = train_recipe(
            tmp_path,
            *own("two_drafts"),
            "sdar.context.sources=[hint]",
            "sdar.context.writer.source=endpoint",
            f"sdar.context.writer.url={server.url}",
            "sdar.context.writer.model=toy",
            "algorithm.adv_estimator=sdar",
        )
    sound(run)
    metrics = run.metrics[1]
    assert metrics["sdar/rows"] == 2 * 16 and metrics["sdar/context_share"] == 0.5
    assert "How many" in server.prompts[0] and "Turn 2." in server.prompts[0]
