"""The agent loop with a scripted model and environment: rows, teacher prompts, faults. No Ray."""

from __future__ import annotations

import platform
import re

import pytest
from transformers import AutoTokenizer

from sdar_verl.context import registry
from sdar_verl.context.registry import Context, ContextError
from sdar_verl.envs.base import Step
from sdar_verl.local import start_policy
from tests.support.scripted import GOOD, LOST, MUTE, WRONG, Pool, Server, Session, play_episode


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(start_policy())


@pytest.fixture
def play(tokenizer, monkeypatch):
    return lambda script, **kwargs: play_episode(monkeypatch, tokenizer, script, **kwargs)


def test_each_turn_is_a_row_with_the_episodes_reward(play, tokenizer):
    rows, infos, server, _ = play([LOST, GOOD])
    assert len(rows) == 2
    assert [row.reward_score for row in rows] == [10.0, 10.0]
    assert [info.turn for info in infos] == [0, 1]
    assert all(info.success and not info.invalid and not info.failed for info in infos)
    for row, (prompt_ids, _) in zip(rows, server.requests, strict=True):
        assert row.prompt_ids == prompt_ids
        assert row.response_mask == [1] * len(row.response_ids)
        assert len(row.response_logprobs) == len(row.response_ids)
    second = tokenizer.decode(rows[1].prompt_ids)
    assert "go to desk 1" in second
    outcome = rows[-1].extra_fields["reward_extra_info"]
    assert (outcome["acc"], outcome["turns"], outcome["invalid_actions"]) == (1.0, 2.0, 0.0)


def test_forms_are_offered_and_graded_scores_are_kept(play, tokenizer):
    class Graded(Session):
        async def reset(self):
            return Step("you see a fridge 1 .", action_forms=("go to <place>",))

        async def step(self, action):
            self.pool.actions.append(action)
            return Step("done .", done=True, score=0.25)

    pool = Pool()
    pool.session = lambda task: Graded(pool)
    rows, infos, _, _ = play([WRONG], pool=pool)
    assert pool.actions == ["go to bed 1"]
    assert not infos[0].invalid
    assert (infos[0].score, infos[0].success) == (0.25, False)
    assert rows[0].extra_fields["reward_extra_info"]["task_score"] == 0.25


def test_the_teacher_sees_the_skill_and_the_student_does_not(play, tokenizer):
    rows, infos, _, _ = play([GOOD])
    teacher = tokenizer.decode(infos[0].teacher_prompt_ids.tolist())
    student = tokenizer.decode(rows[0].prompt_ids)
    assert "apple in" in teacher
    assert "apple in" not in student
    assert infos[0].context_tokens == len(infos[0].teacher_prompt_ids) - len(rows[0].prompt_ids) > 0
    assert infos[0].skills[0] == "apple"


def test_invalid_answers_are_told_apart_and_cost_their_turn(play):
    rows, infos, _, pool = play([MUTE, WRONG, LOST])
    assert [(info.unparsed, info.inadmissible, info.invalid) for info in infos] == [
        (True, False, True),
        (False, True, True),
        (False, False, False),
    ]
    assert pool.actions == ["none", "go to bed 1", "go to desk 1"]
    assert rows[0].reward_score == 0.0
    assert rows[0].extra_fields["reward_extra_info"]["invalid_actions"] == 2.0


def test_a_long_teacher_prompt_is_an_error_that_stops_the_run(play):
    _, infos, _, _ = play([GOOD], teacher__max_prompt_length=20)
    assert "sdar.teacher.max_prompt_length=20 is too small" in infos[0].error
    assert "on_long_prompt=drop_history or mask" in infos[0].error
    assert infos[0].teacher_prompt_ids is None


def test_or_masks_the_row_by_choice(play):
    _, infos, _, _ = play([GOOD], teacher__max_prompt_length=20, teacher__on_long_prompt="mask")
    assert infos[0].error is None
    assert infos[0].truncated
    assert infos[0].teacher_prompt_ids is None


def test_or_drops_history_and_keeps_the_skills(play, tokenizer):
    _, whole, _, _ = play([LOST, LOST, GOOD])
    limit = len(whole[2].teacher_prompt_ids) - 1
    _, infos, _, _ = play([LOST, LOST, GOOD], teacher__max_prompt_length=limit, teacher__on_long_prompt="drop_history")
    assert infos[2].truncated and not infos[0].truncated
    assert len(infos[2].teacher_prompt_ids) <= limit
    assert "apple in" in tokenizer.decode(infos[2].teacher_prompt_ids.tolist())


def test_a_long_student_prompt_loses_its_oldest_history_first(play):
    rows, _, _, _ = play([LOST, LOST, GOOD])
    limit = len(rows[2].prompt_ids) - 1
    rows, infos, _, _ = play([LOST, LOST, GOOD], max_prompt_length=limit)
    assert [info.history_dropped for info in infos] == [0, 0, 1]
    assert len(rows[2].prompt_ids) <= limit


def test_a_prompt_that_never_fits_stops_the_run(play):
    _, infos, _, _ = play([GOOD], max_prompt_length=5)
    assert infos[0].failed
    assert "data.max_prompt_length=5 is too small" in infos[0].error


def test_no_skill_leaves_the_teacher_without_a_say(play):
    _, infos, _, _ = play([GOOD], skills__retrieval=["none"])
    assert infos[0].teacher_prompt_ids is None
    assert infos[0].error is None


@pytest.mark.parametrize("rows", [{}, {"rollout__rows": "trajectory", "rollout__turn_length": 20}])
def test_a_task_without_a_context_is_counted_or_stops_the_run(play, rows):
    settings = {"skills__retrieval": ["none"], "max_response_length": 60 if rows else 20, **rows}
    _, infos, _, _ = play([LOST, GOOD], **settings)
    assert all(info.context_empty and info.error is None for info in infos)
    _, infos, _, _ = play([LOST, GOOD], context__on_empty="error", **settings)
    assert "task task-1: sdar.context.sources=['skills'] find nothing" in infos[0].error
    assert "sdar.context.on_empty=mask" in infos[0].error
    del settings["skills__retrieval"]
    _, infos, _, _ = play([LOST, GOOD], context__on_empty="error", **settings)
    assert not any(info.context_empty or info.error for info in infos)


def test_a_validation_arm_shows_skills_and_sets_the_temperature(play, tokenizer):
    arms = {"teacher": {"context": "skills", "temperature": 0.4}, "student": {"context": "none", "temperature": 0.0}}
    rows, infos, server, _ = play([GOOD], validation__arms=arms, columns={"sdar_arm": "teacher"})
    assert "apple in" in tokenizer.decode(rows[0].prompt_ids)
    assert server.requests[0][1]["temperature"] == 0.4
    assert infos[0].teacher_prompt_ids is None
    assert rows[0].extra_fields["reward_extra_info"]["arm"] == "teacher"
    rows, _, server, _ = play([GOOD], validation__arms=arms, columns={"sdar_arm": "student"})
    assert "apple in" not in tokenizer.decode(rows[0].prompt_ids)
    assert server.requests[0][1]["temperature"] == 0.0


def test_seeds_are_per_request_and_repeat(play):
    def seeds(**columns):
        _, _, server, _ = play([LOST, LOST, LOST], columns=columns)
        return [params["seed"] for _, params in server.requests]

    first = seeds()
    assert first == seeds()
    assert len({*first, *seeds(session_id=1), *seeds(global_steps=6)}) == 9
    _, _, server, _ = play([GOOD], rollout__seed=None)
    assert "seed" not in server.requests[0][1]


def test_a_dead_environment_is_tried_once_more(play):
    rows, infos, _, pool = play([GOOD, GOOD], pool=Pool(dies=1))
    assert pool.opened == 2
    assert len(rows) == 1
    assert infos[0].success and not infos[0].failed


def test_two_deaths_give_one_masked_row(play):
    rows, infos, _, _ = play([GOOD, GOOD], pool=Pool(dies=2))
    assert len(rows) == 1
    assert infos[0].failed and infos[0].error is None
    assert rows[0].response_mask == [0]
    assert rows[0].extra_fields["reward_extra_info"]["failed"] == 1.0


def test_a_rollout_server_that_raises_costs_the_episode(play, monkeypatch):
    """Raised further, it would cost the whole group, and a step of nothing else would end with verl's guess at why."""

    async def fails(self, *_, **__):
        raise ConnectionError("no such actor")

    monkeypatch.setattr(Server, "generate", fails)
    rows, infos, _, _ = play([GOOD])
    assert len(rows) == 1 and rows[0].response_mask == [0]
    assert infos[0].failed and infos[0].error is None
    assert infos[0].failure == "the rollout server raised ConnectionError: no such actor"


def test_an_environment_that_refuses_stops_the_run(play):
    _, infos, _, _ = play([GOOD], pool=Pool(refuses=True))
    assert infos[0].failed
    assert "task task-1: no such game" in infos[0].error


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"skills__bank": "of/another/node"}, "SkillBankError .* skill bank 'of/another/node' is neither"),
        ({"modules": ["not_installed_here"]}, "ConfigError .* not_installed_here cannot be imported here"),
    ],
)
def test_what_is_missing_on_one_node_stops_the_run(play, config, reason):
    """verl would drop the groups of that node's agent loops, and train on the others'."""
    _, infos, _, _ = play([GOOD], **config)
    assert infos[0].failed
    assert re.search(reason, infos[0].error), infos[0].error
    assert f"on {platform.node()}" in infos[0].error


def test_an_answer_without_an_action_can_send_its_last_line(play):
    said = "<think> apple in desk </think>\n\ngo to fridge 1"
    rows, infos, _, pool = play([said], env__invalid_action="last_line")
    assert pool.actions == ["go to fridge 1"]
    assert infos[0].unparsed and infos[0].success
    assert rows[0].extra_fields["reward_extra_info"]["invalid_actions"] == 1.0
    _, _, _, pool = play([said, GOOD])
    assert pool.actions[0] == "none"


def test_skills_in_the_students_own_prompt(play, tokenizer):
    """Skill-GRPO: training shows them, a validation arm decides for itself."""
    grpo = {"context__student": "skills", "teacher__source": "none", "loss__coef": 0}
    rows, infos, _, _ = play([GOOD], **grpo)
    assert "apple in" in tokenizer.decode(rows[0].prompt_ids)
    assert infos[0].teacher_prompt_ids is None and infos[0].skills[0] == "apple"
    arms = {"plain": {"context": "none", "temperature": 1.0}}
    rows, _, _, _ = play([GOOD], validation__arms=arms, columns={"sdar_arm": "plain"}, **grpo)
    assert "apple in" not in tokenizer.decode(rows[0].prompt_ids)


def test_a_validation_arm_can_show_what_the_teacher_sees(play, tokenizer):
    arms = {"teacher": {"context": "teacher", "temperature": 1.0}}
    settings = {"validation__arms": arms, "context__control": "shuffled"}
    _, infos, _, _ = play([GOOD], **settings)
    rows, _, _, _ = play([GOOD], columns={"sdar_arm": "teacher"}, **settings)
    assert rows[0].prompt_ids == infos[0].teacher_prompt_ids.tolist()
    rows, _, _, _ = play([GOOD], columns={"sdar_arm": "teacher"}, validation__arms=arms, context__control="empty")
    plain, _, _, _ = play([GOOD])
    assert rows[0].prompt_ids == plain[0].prompt_ids


def test_a_context_that_cannot_be_made_stops_the_run(play, monkeypatch):
    def broken(request):
        raise ContextError("the shelf is empty")

    monkeypatch.setattr(registry, "_contexts", {**registry._contexts, "broken": Context("broken", broken, False)})
    _, infos, _, _ = play([GOOD], context__sources=["broken"])
    assert infos[0].failed
    assert "task task-1: the shelf is empty" in infos[0].error


def test_rows_keep_what_a_trace_or_a_late_context_needs(play):
    _, infos, _, _ = play([LOST, MUTE, GOOD])
    assert [(info.task_id, info.action) for info in infos] == [
        ("task-1", "go to desk 1"),
        ("task-1", None),
        ("task-1", "go to fridge 1"),
    ]
    assert [info.observation for info in infos] == ["you see a fridge 1 and a desk 1 .", *["nothing happens ."] * 2]
    assert [info.episode is not None for info in infos] == [True, False, False]
    note = infos[0].episode
    assert (note.task["task_id"], note.reward, note.last_observation) == ("task-1", 10.0, "you win .")
    assert "apple in" in note.context


def test_whatever_else_goes_wrong_in_an_episode_is_a_counted_loss(play, monkeypatch):
    """Raised, it would cost the group, and verl would advise to draw groups again, for ever."""
    monkeypatch.setattr("sdar_verl.rollout.agent_loop.parse_action", lambda *_, **__: {}["a bug"])
    rows, infos, _, _ = play([GOOD])
    assert len(rows) == 1 and rows[0].response_mask == [0]
    assert infos[0].failed and infos[0].error is None
    assert infos[0].failure == "KeyError in the agent loop: 'a bug'"
    assert rows[0].extra_fields["reward_extra_info"]["failure"] == infos[0].failure


def test_a_retired_teachers_rows_have_no_prompt_of_its_own(tokenizer, monkeypatch):
    taught, retired = (
        play_episode(monkeypatch, tokenizer, [LOST, GOOD], columns=columns)[:2]
        for columns in ({}, {"sdar_retired": True})
    )
    assert all(info.has_teacher for info in taught[1])
    assert not any(info.has_teacher or info.context_empty for info in retired[1])
    for (before, after), plain in zip(zip(taught[0], retired[0], strict=True), retired[1], strict=True):
        assert after.prompt_ids == before.prompt_ids and after.response_ids == before.response_ids
        assert plain.teacher_prompt_ids is None
