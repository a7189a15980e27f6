"""The agent loop with a scripted model and environment: rows, teacher prompts, faults. No Ray."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import DictConfigWrap

from sdar_verl.config import SdarConfig
from sdar_verl.envs.base import Step, Task
from sdar_verl.envs.pool import EnvError, EnvProcessError
from sdar_verl.local import start_policy
from sdar_verl.rollout import runtime
from sdar_verl.rollout.agent_loop import SdarAgentLoop
from sdar_verl.rollout.rows import RowInfo

ACTIONS = ("go to fridge 1", "go to desk 1")
TASK = Task("scripted", "task-1", "pick_and_place_simple", "put some apple on desk", {})
GOOD = "<think> apple in fridge </think> <action> go to fridge 1 </action>"
LOST = "<think> apple in desk </think> <action> go to desk 1 </action>"
MUTE = "<think> apple in desk </think>"
WRONG = "<think> apple in desk </think> <action> go to bed 1 </action>"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(start_policy())


class Session:
    """Wins when the agent goes to the fridge."""

    def __init__(self, pool):
        self.pool = pool

    async def __aenter__(self):
        self.pool.opened += 1
        return self

    async def __aexit__(self, *_):
        pass

    async def reset(self):
        if self.pool.refuses:
            raise EnvError("no such game")
        return Step("you see a fridge 1 and a desk 1 .", admissible_actions=ACTIONS)

    async def step(self, action):
        if self.pool.opened <= self.pool.dies:
            raise EnvProcessError("the process died")
        self.pool.actions.append(action)
        won = action == "go to fridge 1"
        text = "you win ." if won else "nothing happens ."
        return Step(text, reward=10.0 * won, done=won, success=won, admissible_actions=ACTIONS)


class Pool:
    def __init__(self, dies=0, refuses=False):
        self.opened, self.dies, self.refuses, self.actions = 0, dies, refuses, []

    def session(self, task):
        assert task == TASK
        return Session(self)


class Server:
    """Answers with a script and keeps what it was asked."""

    def __init__(self, tokenizer, script):
        self.tokenizer, self.script, self.requests = tokenizer, list(script), []

    async def generate(self, request_id, *, prompt_ids, sampling_params):
        ids = self.tokenizer(self.script[len(self.requests)], add_special_tokens=False)["input_ids"]
        ids = [*ids, self.tokenizer.eos_token_id]
        self.requests.append((prompt_ids, sampling_params))
        return SimpleNamespace(
            token_ids=ids,
            log_probs=[-0.5] * len(ids),
            num_preempted=0,
            extra_fields={"min_global_steps": 3, "max_global_steps": 3},
        )


@pytest.fixture
def play(tokenizer, monkeypatch):
    def run(script, *, pool=None, columns=None, max_prompt_length=300, **settings):
        node = SdarConfig().model_dump()
        node["prompt"]["template"] = "alfworld_compact"
        node["skills"]["bank"] = "alfworld_household"
        node["env"]["max_steps"] = 3
        node["rollout"]["seed"] = 7
        for option, value in settings.items():
            group, name = option.split("__")
            node[group][name] = value
        config = OmegaConf.create(
            {
                "sdar": node,
                "data": {"max_prompt_length": max_prompt_length, "max_response_length": 20},
                "actor_rollout_ref": {"rollout": {"calculate_log_probs": True}},
            }
        )
        pool = pool or Pool()
        monkeypatch.setattr(runtime.Runtime, "pool", pool)
        server = Server(tokenizer, script)
        loop = SdarAgentLoop(trainer_config=DictConfigWrap(config), server_manager=server, tokenizer=tokenizer)
        kwargs = {"task": json.dumps(asdict(TASK)), "global_steps": 5, "session_id": 0, **(columns or {})}
        rows = asyncio.run(loop.run({"temperature": 1.0, "top_p": 1.0}, **kwargs))
        return rows, [RowInfo.from_extra_fields(row.extra_fields) for row in rows], server, pool

    return run


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


def test_an_environment_that_refuses_stops_the_run(play):
    _, infos, _, _ = play([GOOD], pool=Pool(refuses=True))
    assert infos[0].failed
    assert "task task-1: no such game" in infos[0].error
