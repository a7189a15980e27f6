"""A scripted model and environment for the agent loop, without Ray."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap

from sdar_verl.config import SdarConfig
from sdar_verl.envs.base import Step, Task
from sdar_verl.envs.pool import EnvError, EnvProcessError
from sdar_verl.fields import TEACHER_LOG_PROBS, TEACHER_MASK, TEACHER_PROMPTS
from sdar_verl.rollout import runtime
from sdar_verl.rollout.agent_loop import SdarAgentLoop
from sdar_verl.rollout.rows import RowInfo

ACTIONS = ("go to fridge 1", "go to desk 1")
TASK = Task("scripted", "task-1", "pick_and_place_simple", "put some apple on desk", {})
GOOD = "<think> apple in fridge </think> <action> go to fridge 1 </action>"
LOST = "<think> apple in desk </think> <action> go to desk 1 </action>"
MUTE = "<think> apple in desk </think>"
WRONG = "<think> apple in desk </think> <action> go to bed 1 </action>"


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


def scripted_config(max_prompt_length=300, max_response_length=20, **settings):
    """A run's config; ``group__option=value`` sets ``sdar.group.option``, ``option=value`` sdar's own."""
    node = SdarConfig().model_dump()
    node["prompt"]["template"] = "alfworld_compact"
    node["skills"]["bank"] = "alfworld_household"
    node["env"]["max_steps"] = 3
    node["rollout"]["seed"] = 7
    for option, value in settings.items():
        *group, name = option.split("__")
        (node[group[0]] if group else node)[name] = value
    return OmegaConf.create(
        {
            "sdar": node,
            "data": {"max_prompt_length": max_prompt_length, "max_response_length": max_response_length},
            "actor_rollout_ref": {
                "rollout": {
                    "name": "transformers",
                    "temperature": 0.8,
                    "calculate_log_probs": True,
                    "agent": {"default_agent_loop": "sdar_agent"},
                }
            },
        }
    )


def play_episode(monkeypatch, tokenizer, script, *, pool=None, columns=None, task=TASK, server=None, **config):
    """Rows of verl, their records, the server and the pool after one episode; ``config`` as :func:`scripted_config`."""
    config = scripted_config(**config)
    pool = pool or Pool()
    monkeypatch.setattr(runtime.Runtime, "pool", pool)
    server = server or Server(tokenizer, script)
    loop = SdarAgentLoop(trainer_config=DictConfigWrap(config), server_manager=server, tokenizer=tokenizer)
    kwargs = {"task": json.dumps(asdict(task)), "global_steps": 5, "session_id": 0, **(columns or {})}
    rows = asyncio.run(loop.run({"temperature": 1.0, "top_p": 1.0}, **kwargs))
    return rows, [read_row(row) for row in rows], server, pool


def read_row(row) -> RowInfo:
    """The record of one of verl's rows, with what lies in columns beside it put back."""
    info = RowInfo.from_extra_fields(row.extra_fields)
    if len(row.columns.get(TEACHER_PROMPTS, ())):
        info.teacher_prompt_ids = row.columns[TEACHER_PROMPTS]
    if row.columns.get(TEACHER_MASK, np.zeros(1)).any():
        info.teacher_log_probs = row.columns[TEACHER_LOG_PROBS]
    return info
