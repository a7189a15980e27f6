"""Demonstration turns as (prompt, response) token ids, through the project's own template, skills and chat template."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from demonstrator import Demonstrator
from simulator import Simulator

from sdar_verl.envs.alfworld.sampling import sample_spec
from sdar_verl.envs.alfworld.spec import LAMP, LAMP_RECEPTACLES, ROOMS, GameSpec, GeneratorConfig, fits
from sdar_verl.rollout.prompts import PromptTemplate
from sdar_verl.skills.bank import SkillBank

TEMPLATE = "alfworld_compact"
BANK = "alfworld_household"
MAX_STEPS = 12
HISTORY = 2


@dataclass(frozen=True)
class Mix:
    """What demonstrations are made of.

    Attributes:
        skill_share: episodes with the skill in the prompt.
        random_with, random_without: share of random actions with and without a skill.
        forget_without: share of episodes without a skill that leave the process out.
        slip_share: share of turns at which something inadmissible is done, so that the policy has seen it; not learnt.
    """

    skill_share: float = 0.6
    random_with: float = 0.03
    random_without: float = 0.10
    forget_without: float = 0.35
    slip_share: float = 0.03


def random_places(rng: random.Random) -> dict[str, str]:
    """A household of its own for one episode, so that weights can learn to read the skill and nothing else."""
    places = {o: rng.choice([r for r in room.usual if fits(r, o)]) for room in ROOMS.values() for o in room.objects}
    places[LAMP] = rng.choice(LAMP_RECEPTACLES)
    return places


class SkillWriter:
    """Skill texts for any household, in the words of the shipped bank: its recipes, its form of a place."""

    def __init__(self) -> None:
        bank = SkillBank.load(BANK)
        self._recipes = {t: skill.text for skill in bank for t in skill.task_types}

    def write(self, spec: GameSpec, places: Mapping[str, str]) -> str:
        """What retrieval gives for a game: the place of its objects, then the recipe."""
        objects = [spec.target, *([spec.toggle] if spec.toggle else [])]
        lines = [f"{o.lower()} in {places[o].lower()} ." for o in objects]
        return "\n\n".join([*lines, self._recipes[spec.task_type]])


def prompt_text(
    template: PromptTemplate, game: Simulator, skills: str, history: list[tuple[str, str]], observation: str
) -> str:
    """Content of the user message of one turn."""
    return template.render(
        task=game.spec.description,
        skills=skills,
        history=[{"observation": seen, "action": done} for seen, done in history[-HISTORY:]],
        observation=observation,
        admissible_actions=game.actions(),
        step=len(history) + 1,
        max_steps=MAX_STEPS,
    )


def response_text(thought: str, action: str) -> str:
    """The format that the policy answers in, without the end token."""
    return f"<think> {thought} </think> <action> {action} </action>"


def demonstrate(
    template: PromptTemplate, writer: SkillWriter, config: GeneratorConfig, index: int, mix: Mix, seed: int
) -> Iterator[tuple[str, str]]:
    """(user message, response) of every turn of one episode."""
    rng = random.Random(f"demonstration/{seed}/{index}")
    places = random_places(rng)
    spec = sample_spec(config, "train", index, places)
    informed = rng.random() < mix.skill_share
    game = Simulator(spec)
    player = Demonstrator(
        game,
        rng,
        places if informed else None,
        random_share=mix.random_with if informed else mix.random_without,
        forgets=not informed and rng.random() < mix.forget_without,
    )
    skills = writer.write(spec, places) if informed else ""
    history: list[tuple[str, str]] = []
    observation = game.introduction()
    for _ in range(MAX_STEPS):
        thought, action = player.act()
        if rng.random() < mix.slip_share:
            action = rng.choice(["none", f"take {spec.target.lower()} 1 from {min(game.place)}"])
        else:
            yield prompt_text(template, game, skills, history, observation), response_text(thought, action)
        history.append((observation, action))
        observation = game.step(action)
        if game.won():
            return


def encode_turn(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt (with the assistant marker) and of a response (with the end token)."""
    messages = [{"role": "user", "content": prompt}]
    prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return prompt_ids, tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
