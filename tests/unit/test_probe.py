"""The internalisation probe against a model whose probabilities are known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdar_verl.envs.base import Step, Task, TextEnv
from sdar_verl.local.probe import FirstTurn, first_turns, internalisation
from sdar_verl.rollout.prompts import PromptTemplate

torch = pytest.importorskip("torch")
VOCABULARY = [
    "<unk>",
    "<user>",
    "<assistant>",
    "<think>",
    "apple",
    "mug",
    "in",
    "fridge",
    "shelf",
    "side",
    "table",
    "x",
]


class WordTokenizer:
    """White-space words; ``sidetable`` is two tokens."""

    unk_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        words = text.replace("sidetable", "side table").split()
        return {"input_ids": [VOCABULARY.index(w) if w in VOCABULARY else 0 for w in words]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        filler = [VOCABULARY.index("x")] * len(messages[0]["content"].split())  # prompts of different lengths
        return [1, *filler, 2]


class KnownModel(torch.nn.Module):
    """Says fridge with .5 after ``apple in``, shelf with .2 after ``mug in``, side with .4 and then table with .25."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.was_training: list[bool] = []

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        self.was_training.append(self.training)
        known = {("apple", "in"): ("fridge", 0.5), ("mug", "in"): ("shelf", 0.2), ("in", "side"): ("table", 0.25)}
        known[("x", "in")] = ("side", 0.4)
        probabilities = torch.full((*input_ids.shape, len(VOCABULARY)), 1e-9)
        for row in range(input_ids.shape[0]):
            for column in range(1, input_ids.shape[1]):
                pair = (VOCABULARY[input_ids[row, column - 1]], VOCABULARY[input_ids[row, column]])
                if pair in known:
                    word, probability = known[pair]
                    probabilities[row, column, VOCABULARY.index(word)] = probability
                    probabilities[row, column, 0] = 1 - probability
        return SimpleNamespace(logits=probabilities.log())


def turn(target: str, place: str, task: str = "find it") -> FirstTurn:
    return FirstTurn(task, "You are in a room.", ("go to fridge 1",), target, place)


@pytest.fixture(scope="module")
def template() -> PromptTemplate:
    return PromptTemplate.load("alfworld_compact")


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_exact_probability_of_the_usual_place_averaged_over_games(template: PromptTemplate, batch_size: int) -> None:
    turns = [
        turn("apple", "fridge"),
        turn("mug", "shelf", "find a mug and put it down"),
        turn("x", "sidetable", "look"),
    ]
    model = KnownModel().train()
    value = internalisation(model, WordTokenizer(), turns, template, max_steps=12, batch_size=batch_size)
    assert value == pytest.approx((0.5 + 0.2 + 0.4 * 0.25) / 3, abs=1e-6)
    assert model.training and not any(model.was_training)


def test_unknown_words_and_empty_panels_are_errors(template: PromptTemplate) -> None:
    with pytest.raises(ValueError, match="'apple' in 'cellar'"):
        internalisation(KnownModel(), WordTokenizer(), [turn("apple", "cellar")], template, max_steps=12)
    with pytest.raises(ValueError, match="at least one game"):
        internalisation(KnownModel(), WordTokenizer(), [], template, max_steps=12)


class OneRoom(TextEnv):
    """Shows the same room for every task."""

    def reset(self, task: Task) -> Step:
        return Step(f"You are in {task.task_id}.", admissible_actions=("go to fridge 1",))

    def step(self, action: str) -> Step:
        raise NotImplementedError


def test_first_turns_come_from_the_environment_and_the_games_own_record(tmp_path: Path) -> None:
    trajectory = {"pddl_params": {"object_target": "CellPhone"}, "sdar": {"usual_place": "SideTable"}}
    (tmp_path / "traj_data.json").write_text(json.dumps(trajectory))
    task = Task(
        "alfworld", "room 7", "pick_and_place_simple", "put a phone", {"game_file": str(tmp_path / "game.tw-pddl")}
    )
    assert first_turns([task], OneRoom()) == [
        FirstTurn("put a phone", "You are in room 7.", ("go to fridge 1",), "cellphone", "sidetable")
    ]
    (tmp_path / "traj_data.json").write_text(json.dumps({"pddl_params": {"object_target": "CellPhone"}}))
    with pytest.raises(ValueError, match="no usual place is known"):
        first_turns([task], OneRoom())
