"""Episodes per minute: each on its own, against lock-step with finished environments kept generating.

    python -m benchmarks.rollout [--episodes 32] [--rounds 2]

Both arms play the same real ALFWorld games with the start policy on the project's CPU server (one thread), in this
process. Every request has its own seed, so both play the same episodes, answer for answer. They differ in the loop:

own pace   an episode asks for its next answer when its environment has answered, and is gone when it ends
lock-step  each turn is one batch of requests for all environments, also for those that have finished, until the last
           one has: the released code's way

The gain is that of the answers nobody needs, and of waiting: it depends on how much the lengths of episodes differ, so
there is a row per setting, from the quick start's 12 turns to the 50 of the paper, without a skill and with one.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Cost, as_task, machine, median, ratio, real_games, table
from sdar_verl.config import SkillsConfig
from sdar_verl.envs.alfworld.env import AlfworldEnv
from sdar_verl.envs.base import Step, Task
from sdar_verl.local import start_policy
from sdar_verl.local.sampling import SamplingParams
from sdar_verl.local.scheduler import BatchScheduler
from sdar_verl.rollout.actions import match_admissible, parse_action
from sdar_verl.rollout.prompt_builder import PromptBuilder, TurnView
from sdar_verl.rollout.prompts import PromptTemplate
from sdar_verl.skills.loading import load_run_bank
from sdar_verl.skills.retrieval import render_skills, retrieve

HIDDEN = ("help", "inventory", "look", "examine")
HISTORY, ANSWER, LIMIT = 2, 20, 480


@dataclass(frozen=True)
class Setting:
    """What is played: turns allowed, temperature, whether the prompt holds the skills of the task."""

    turns: int
    temperature: float
    skills: bool


SETTINGS = [Setting(12, 1.0, False), Setting(50, 1.0, False), Setting(50, 0.4, False), Setting(50, 1.0, True)]


class Model:
    """The start policy behind the project's scheduler."""

    def __init__(self, slots: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(start_policy(), dtype=torch.float32, attn_implementation="sdpa")
        self.tokenizer = AutoTokenizer.from_pretrained(start_policy())
        self.prompts = PromptBuilder(self.tokenizer, PromptTemplate.load("alfworld_compact"))
        self.scheduler = BatchScheduler(
            model.eval(), eos_token_ids=[self.tokenizer.eos_token_id], max_num_seqs=slots, max_num_batched_tokens=2048
        )
        self.bank = load_run_bank(SkillsConfig(bank="alfworld_household"), "alfworld")

    async def answer(self, prompt: list[int], temperature: float, seed: int) -> list[int]:
        """Sampled token ids."""
        params = SamplingParams(ANSWER, temperature=temperature, seed=seed)
        return (await asyncio.wrap_future(self.scheduler.submit(prompt, params))).token_ids


@dataclass
class Episode:
    """One game in play."""

    model: Model
    env: AlfworldEnv
    task: Task
    setting: Setting
    number: int
    step: Step
    skills: str = ""
    history: list[tuple[str, str | None]] = field(default_factory=list)

    @classmethod
    def start(cls, model: Model, env: AlfworldEnv, task: Task, setting: Setting, number: int) -> Episode:
        """Reset the game."""
        found = retrieve(model.bank, task, ["keyword", "task_type"], 0, {}, None).skills if setting.skills else ()
        return cls(model, env, task, setting, number, env.reset(task), render_skills(found))

    @property
    def over(self) -> bool:
        """Nothing is left to play."""
        return self.step.done or len(self.history) >= self.setting.turns

    async def generate(self, turn: int) -> list[int]:
        """Prompt and answer of a turn."""
        shown = TurnView(
            task=self.task.description,
            history=tuple(self.history[-HISTORY:]),
            observation=self.step.observation,
            admissible_actions=self.step.admissible_actions,
            step=min(turn, self.setting.turns - 1) + 1,
            max_steps=self.setting.turns,
        )
        ids, _ = self.model.prompts.fit(shown, self.skills, limit=LIMIT, drop_history=True, option="LIMIT")
        seed = int.from_bytes(hashlib.sha256(f"{self.number}|{turn}".encode()).digest()[:4], "big")
        return await self.model.answer(ids, self.setting.temperature, seed)

    def act(self, answer: list[int]) -> None:
        """Send the answer's action to the game."""
        text = self.model.tokenizer.decode(answer, skip_special_tokens=True)
        action = parse_action(text).action
        if action is not None:
            action = match_admissible(action, self.step.admissible_actions) or action
        self.history.append((self.step.observation, action))
        self.step = self.env.step(action or "none")


async def own_pace(episodes: Sequence[Episode]) -> None:
    """Every episode by itself."""

    async def play(episode: Episode) -> None:
        while not episode.over:
            episode.act(await episode.generate(len(episode.history)))

    await asyncio.gather(*[play(episode) for episode in episodes])


async def lock_step(episodes: Sequence[Episode]) -> None:
    """All together until the last has ended."""
    turn = 0
    while not all(episode.over for episode in episodes):
        answers = await asyncio.gather(*[episode.generate(turn) for episode in episodes])
        for episode, answer in zip(episodes, answers, strict=True):
            if not episode.over:
                episode.act(answer)
        turn += 1


ARMS = {"own pace": own_pace, "lock-step": lock_step}


@dataclass
class Played:
    """What an arm did in one setting, over the rounds."""

    costs: list[Cost] = field(default_factory=list)
    answers: int = 0
    turns: int = 0
    solved: int = 0


def compare(model: Model, envs: Sequence[AlfworldEnv], tasks: Sequence[Task], setting: Setting, rounds: int) -> Any:
    """Arm -> what it did."""
    played = {name: Played() for name in ARMS}
    for number in range(rounds):
        for name in list(ARMS) if number % 2 == 0 else reversed(list(ARMS)):
            episodes = [
                Episode.start(model, env, tasks[i % len(tasks)], setting, i + 1000 * number)
                for i, env in enumerate(envs)
            ]
            before = model.scheduler.counters()["requests"]
            wall, cpu = time.perf_counter(), time.process_time()
            asyncio.run(ARMS[name](episodes))
            arm = played[name]
            arm.costs.append(Cost(time.perf_counter() - wall, time.process_time() - cpu))
            arm.answers += int(model.scheduler.counters()["requests"] - before)
            arm.turns += sum(len(episode.history) for episode in episodes)
            arm.solved += sum(episode.step.success for episode in episodes)
    return played


def row(setting: Setting, played: dict[str, Played], episodes: int) -> list[str]:
    """Of the table."""
    own, locked = (played[name] for name in ARMS)
    total = episodes * len(own.costs)
    return [
        f"{setting.turns} turns, T={setting.temperature:g}, {'skills' if setting.skills else 'no skills'}",
        f"{own.turns / total:.1f}",
        f"{own.solved / total:.2f} and {locked.solved / total:.2f}",
        *(f"{arm.answers / total:.1f}" for arm in (own, locked)),
        *(f"{60 * episodes / median(arm.costs, 'wall'):.0f}" for arm in (own, locked)),
        f"{ratio(locked.costs, own.costs, 'wall'):.2f}",
        f"{ratio(locked.costs, own.costs, 'cpu'):.2f}",
    ]


HEAD = [
    "setting",
    "mean turns",
    "solved",
    "answers per episode",
    "lock-step",
    "episodes/min",
    "lock-step",
    "wall ratio",
    "CPU ratio",
]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--games", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--turns", type=int, help="instead of each setting's own")
    parser.add_argument("--data", type=Path, default=Path("outputs/benchmarks/games"), help="games are kept here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = [as_task(game) for game in real_games(args.data / "small_room", args.games)]
    envs = [AlfworldEnv(hide_actions=HIDDEN, success_reward=1.0) for _ in range(args.episodes)]
    model = Model(args.episodes)
    print(machine("torch", "transformers", "textworld") + "\n", flush=True)
    lines = []
    settings = [Setting(args.turns or s.turns, s.temperature, s.skills) for s in SETTINGS]
    try:
        compare(model, envs, tasks, Setting(1, 1.0, False), 1)  # warms up engine and model
        for setting in settings:
            lines.append(row(setting, compare(model, envs, tasks, setting, args.rounds), args.episodes))
    finally:
        model.scheduler.close()
    print(table(HEAD, lines))


if __name__ == "__main__":
    main()
