"""Measures a start policy: python scripts/start_policy/evaluate.py --policy DIR [--games 128] [--data GAMES]

Success, invalid actions and lengths on held-out floor plans of the default household: without a skill, with it, and
with a skill that names wrong places. The project's own evaluation goes through verl; this one needs a minute.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from episodes import HISTORY, MAX_STEPS, TEMPLATE, SkillWriter
from simulator import Simulator

from sdar_verl.envs.alfworld.env import AlfworldEnv
from sdar_verl.envs.alfworld.generate import generate_games
from sdar_verl.envs.alfworld.sampling import sample_spec
from sdar_verl.envs.alfworld.spec import LAMP, LAMP_RECEPTACLES, ROOMS, GameSpec, GeneratorConfig, fits, usual_places
from sdar_verl.envs.base import Task
from sdar_verl.local.probe import first_turns, internalisation
from sdar_verl.rollout.actions import match_admissible, parse_action
from sdar_verl.rollout.prompts import PromptTemplate

MAX_RESPONSE = 20


class SimulatedGame:
    """The simulator as a game to play."""

    def __init__(self, spec: GameSpec) -> None:
        self._game = Simulator(spec)
        self.observation = self._game.introduction()

    def actions(self) -> list[str]:
        return self._game.actions()

    def step(self, action: str) -> bool:
        self.observation = self._game.step(action)
        return self._game.won()


class EngineGame:
    """The project's own environment on a generated game file."""

    def __init__(self, task: Task) -> None:
        self._environment = AlfworldEnv()
        self._last = self._environment.reset(task)

    @property
    def observation(self) -> str:
        return self._last.observation

    def actions(self) -> list[str]:
        return list(self._last.admissible_actions)

    def step(self, action: str) -> bool:
        self._last = self._environment.step(action)
        return self._last.success


class Episode:
    """One game with its history."""

    def __init__(self, spec: GameSpec, game: Any, skills: str) -> None:
        self.spec, self.game, self.skills = spec, game, skills
        self.history: list[tuple[str, str]] = []
        self.won, self.invalid = False, 0

    @property
    def over(self) -> bool:
        return self.won or len(self.history) == MAX_STEPS

    def prompt(self, template: PromptTemplate) -> str:
        return template.render(
            task=self.spec.description,
            skills=self.skills,
            history=[{"observation": seen, "action": done} for seen, done in self.history[-HISTORY:]],
            observation=self.game.observation,
            admissible_actions=self.game.actions(),
            step=len(self.history) + 1,
            max_steps=MAX_STEPS,
        )

    def answer(self, text: str) -> None:
        parsed = parse_action(text).action
        action = match_admissible(parsed, self.game.actions()) if parsed else None
        self.invalid += action is None
        observation = self.game.observation
        self.won = self.game.step(action or parsed or "none")
        self.history.append((observation, action or parsed or "none"))


@torch.no_grad()
def respond(
    model: Any, tokenizer: Any, prompts: list[list[int]], temperature: float, generator: torch.Generator
) -> list[list[int]]:
    """Sample a response to each prompt, end token included."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    sampled: list[torch.Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(MAX_RESPONSE):
        token = torch.multinomial((output.logits[:, -1] / temperature).softmax(-1), 1, generator=generator)
        sampled.append(token)
        ended |= token[:, 0] == tokenizer.eos_token_id
        if ended.all():
            break
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        output = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=(mask.sum(1, keepdim=True) - 1),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    rows = torch.cat(sampled, dim=1).tolist()
    return [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows]


def play(
    model: Any, tokenizer: Any, template: PromptTemplate, episodes: list[Episode], temperature: float, seed: int
) -> dict[str, float]:
    """Play episodes to their end side by side; figures over them."""
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths: list[int] = []
    response_lengths: list[int] = []
    while running := [e for e in episodes if not e.over]:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": e.prompt(template)}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
            for e in running
        ]
        for episode, prompt, ids in zip(
            running, prompts, respond(model, tokenizer, prompts, temperature, generator), strict=True
        ):
            prompt_lengths.append(len(prompt))
            response_lengths.append(len(ids))
            episode.answer(tokenizer.decode(ids, skip_special_tokens=True))
    turns = len(prompt_lengths)
    won, played = Counter(e.spec.task_type for e in episodes if e.won), Counter(e.spec.task_type for e in episodes)
    return {
        "success": round(sum(won.values()) / len(episodes), 3),
        "invalid": round(sum(e.invalid for e in episodes) / turns, 4),
        "turns": round(turns / len(episodes), 2),
        "prompt_mean": round(sum(prompt_lengths) / turns, 1),
        "prompt_max": max(prompt_lengths),
        "response_mean": round(sum(response_lengths) / turns, 1),
        "response_max": max(response_lengths),
        **{f"success/{t}": round(won[t] / n, 2) for t, n in sorted(played.items())},
    }


def wrong_places(places: Mapping[str, str], seed: int) -> dict[str, str]:
    """Another place than the usual one for every object type."""
    rng = random.Random(seed)
    wrong = {
        o: rng.choice([r for r in room.usual if fits(r, o) and r != places[o]])
        for room in ROOMS.values()
        for o in room.objects
    }
    wrong[LAMP] = rng.choice([r for r in LAMP_RECEPTACLES if r != places[LAMP]])
    return wrong


def main() -> None:
    """Print one JSON line per condition, then the probe."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--games", type=int, default=128)
    parser.add_argument(
        "--data", type=Path, help="where the games are or shall be; default: the simulator plays instead"
    )
    parser.add_argument("--split", default="valid_unseen")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; the games are the household's own")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.policy)
    model = AutoModelForCausalLM.from_pretrained(options.policy, dtype=torch.float32).eval()
    template, writer, places = PromptTemplate.load(TEMPLATE), SkillWriter(), usual_places()
    specs = [sample_spec(GeneratorConfig(), options.split, i) for i in range(options.games)]
    tasks: list[Task] = []
    if options.data:
        files = generate_games(options.data, options.split, options.games, GeneratorConfig())
        tasks = [
            Task("alfworld", str(i), spec.task_type, spec.description, {"game_file": str(file)})
            for i, (spec, file) in enumerate(zip(specs, files, strict=True))
        ]
    conditions = [("no skill", None, 1.0), ("no skill", None, 0.4), ("skill", places, 1.0), ("skill", places, 0.4)]
    for name, told, temperature in [*conditions, ("wrong skill", wrong_places(places, 3), 1.0)]:
        games = [EngineGame(task) for task in tasks] or [SimulatedGame(spec) for spec in specs]
        episodes = [
            Episode(spec, game, writer.write(spec, told) if told else "")
            for spec, game in zip(specs, games, strict=True)
        ]
        figures = play(model, tokenizer, template, episodes, temperature, options.seed)
        print(json.dumps({"skill": name, "temperature": temperature, "games": options.games, **figures}), flush=True)
    if tasks:
        turns = first_turns(tasks, AlfworldEnv())
        told_turns = [replace(turn, skills=writer.write(spec, places)) for turn, spec in zip(turns, specs, strict=True)]
        probe = {
            "internalisation": internalisation(model, tokenizer, turns, template, max_steps=MAX_STEPS),
            "with the skill": internalisation(model, tokenizer, told_turns, template, max_steps=MAX_STEPS),
            "uniform over the types in the room": sum(1 / len({r.type for r in s.receptacles}) for s in specs)
            / len(specs),
        }
        print(json.dumps({name: round(value, 3) for name, value in probe.items()}))


if __name__ == "__main__":
    main()
