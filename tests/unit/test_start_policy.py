"""The start policy: its simulator against the engine, its tokenizer, the shipped checkpoint."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("alfworld")
SCRIPTS = Path(__file__).parents[2] / "scripts" / "start_policy"
sys.path.insert(0, str(SCRIPTS))

import demonstrator  # noqa: E402
import episodes  # noqa: E402
import simulator  # noqa: E402
import tokenizer as tokenizers_  # noqa: E402

from sdar_verl.envs.alfworld.env import AlfworldEnv  # noqa: E402
from sdar_verl.envs.alfworld.generate import generate_games  # noqa: E402
from sdar_verl.envs.alfworld.sampling import sample_spec  # noqa: E402
from sdar_verl.envs.alfworld.spec import ROOMS, TASK_TYPES, GeneratorConfig, usual_places  # noqa: E402
from sdar_verl.envs.base import Task  # noqa: E402
from sdar_verl.rollout.actions import parse_action  # noqa: E402
from sdar_verl.rollout.control import special_tokens_of  # noqa: E402
from sdar_verl.rollout.prompts import PromptTemplate  # noqa: E402
from sdar_verl.skills.bank import SkillBank  # noqa: E402
from sdar_verl.skills.retrieval import render_skills, retrieve  # noqa: E402

POLICY = Path(__file__).parents[2] / "sdar_verl" / "local" / "policy"
HIDDEN = ("help", "inventory", "look", "examine")
RESPONSE = "<think> apple in fridge </think> <action> go to fridge 1 </action>"


def words(text: str) -> list[str]:
    """What a text says, whatever the order in which it lists things (the engine's comes from sets)."""
    return sorted(re.findall(r"\w+ \d+|\w+", text))


@pytest.fixture(scope="module")
def policy_tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(POLICY)


def test_simulator_and_engine_say_the_same(tmp_path: Path) -> None:
    config = GeneratorConfig(seed=11)
    count = 2 * len(TASK_TYPES)
    files = generate_games(tmp_path, "train", count, config)
    environment, wins, steps = AlfworldEnv(), set(), 0
    for index, file in enumerate(files):
        spec = sample_spec(config, "train", index)
        game = simulator.Simulator(spec)
        rng = random.Random(index)
        # half the games by a player who knows the household and wins, half mostly at random
        knows = index % 2 == (index // len(TASK_TYPES)) % 2
        player = demonstrator.Demonstrator(
            game, rng, usual_places() if knows else None, random_share=0.1 if knows else 0.7, forgets=False
        )
        real = environment.reset(
            Task("alfworld", str(index), spec.task_type, spec.description, {"game_file": str(file)})
        )
        assert words(real.observation) == words(f"{game.introduction()}\n\nYour task is to: {spec.description}.")
        for _ in range(14):
            shown = sorted(a for a in real.admissible_actions if a.split()[0] not in HIDDEN)
            assert shown == game.actions()
            _, action = player.act()
            answer, real = game.step(action), environment.step(action)
            steps += 1
            assert words(real.observation) == words(answer)
            assert real.success == game.won()
            if real.success:
                wins.add(spec.task_type)
                break
    assert wins == set(TASK_TYPES) and steps > 60


def test_simulator_answers_the_inadmissible_like_the_engine() -> None:
    game = simulator.Simulator(sample_spec(GeneratorConfig(), "train", 0))
    assert game.step("open the window") == simulator.NOTHING
    assert game.at is None and not game.won()


def test_demonstrators_win_far_more_often_with_the_skill() -> None:
    def success(knows: bool) -> float:
        won = 0
        for index in range(120):
            rng = random.Random(f"test/{index}")
            places = episodes.random_places(rng)
            game = simulator.Simulator(sample_spec(GeneratorConfig(), "train", index, places))
            player = demonstrator.Demonstrator(
                game, rng, places if knows else None, random_share=0.0 if knows else 0.1, forgets=not knows
            )
            for _ in range(episodes.MAX_STEPS):
                game.step(player.act()[1])
                if game.won():
                    won += 1
                    break
        return won / 120

    assert success(True) > 0.8
    assert success(False) < 0.5


def test_demonstration_skill_is_what_retrieval_renders_for_the_household() -> None:
    bank, writer = SkillBank.load(episodes.BANK), episodes.SkillWriter()
    for index in range(60):
        spec = sample_spec(GeneratorConfig(), "valid_unseen", index)
        task = Task("alfworld", str(index), spec.task_type, spec.description)
        retrieved = render_skills(retrieve(bank, task, ["keyword", "task_type"]).skills)
        assert writer.write(spec, usual_places()) == retrieved


def test_tokenizer_round_trip(policy_tokenizer: Any) -> None:
    ids = policy_tokenizer(RESPONSE, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(RESPONSE.split())
    for skip in (True, False):
        text = policy_tokenizer.decode([*ids, policy_tokenizer.eos_token_id], skip_special_tokens=skip)
        parsed = parse_action(text, think="required")
        assert (parsed.thought, parsed.action, parsed.error) == ("apple in fridge", "go to fridge 1", None)
    assert policy_tokenizer.decode(ids) == RESPONSE
    same = policy_tokenizer(RESPONSE.replace("apple", "Apple").replace(" </think>", "</think>"))["input_ids"]
    assert same == ids
    assert policy_tokenizer.tokenize("the Fridge 1,apple:") == ["the", "fridge", "1", ",", "apple", ":"]


def test_chat_template_marks_roles_and_appends(policy_tokenizer: Any) -> None:
    user = {"role": "user", "content": "now : apple"}
    assistant = {"role": "assistant", "content": RESPONSE}

    def tokens(messages: list[dict[str, str]], **options: bool) -> list[str]:
        ids = policy_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        return policy_tokenizer.convert_ids_to_tokens(ids)

    prompt = tokens([user], add_generation_prompt=True)
    assert prompt == ["<user>", "now", ":", "apple", "<assistant>"]
    assert tokens([user, assistant]) == [*prompt, *RESPONSE.split(), "<eos>"]
    with pytest.raises(Exception, match="roles user and assistant"):
        tokens([{"role": "system", "content": "x"}])
    # markers written by an environment or a skill must not open a turn
    assert {"<user>", "<assistant>", "<eos>"} <= set(special_tokens_of(policy_tokenizer))


def test_policy_knows_every_word_of_prompts_skills_and_answers(policy_tokenizer: Any) -> None:
    template = PromptTemplate.load(episodes.TEMPLATE, special_tokens_of(policy_tokenizer))
    writer, unknown = episodes.SkillWriter(), policy_tokenizer.unk_token_id
    longest = 0
    for index in range(60):
        for turn in episodes.demonstrate(template, writer, GeneratorConfig(seed=9), index, episodes.Mix(), seed=9):
            prompt, response = episodes.encode_turn(policy_tokenizer, *turn)
            assert unknown not in prompt and unknown not in response
            longest = max(longest, len(prompt) + len(response))
    assert longest < policy_tokenizer.model_max_length
    names = [n.lower() for room in ROOMS.values() for n in (*room.objects, *room.receptacles)]
    assert unknown not in policy_tokenizer(" ".join(names))["input_ids"]


def test_shipped_checkpoint_loads_in_float32_and_reads_its_skill(policy_tokenizer: Any) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from sdar_verl.local.probe import FirstTurn, internalisation

    assert (POLICY / "model.safetensors").stat().st_size < 2_000_000
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    template, writer = PromptTemplate.load(episodes.TEMPLATE), episodes.SkillWriter()
    told, untold = [], []
    for index in range(36):
        places = episodes.random_places(random.Random(index))
        spec = sample_spec(GeneratorConfig(seed=21), "valid_unseen", index, places)
        game = simulator.Simulator(spec)
        for turns, skills in ((told, writer.write(spec, places)), (untold, "")):
            target, place = spec.target.lower(), spec.usual_place.lower()
            turns.append(FirstTurn(spec.description, game.introduction(), tuple(game.actions()), target, place, skills))
    options: dict[str, Any] = {"template": template, "max_steps": episodes.MAX_STEPS}
    assert internalisation(model, policy_tokenizer, told, **options) > 0.9
    # of a household it was never told about it knows no more than what stands in the room
    assert 0.1 < internalisation(model, policy_tokenizer, untold, **options) < 0.25


def test_built_tokenizer_is_deterministic_and_keeps_tags_whole() -> None:
    pytest.importorskip("transformers")
    words_found = tokenizers_.words_of([RESPONSE, "Go to Fridge 1,"])
    assert words_found == [",", "1", "apple", "fridge", "go", "in", "to"]
    built = tokenizers_.build_tokenizer(words_found)
    assert built.decode(built(RESPONSE)["input_ids"]) == RESPONSE
    assert built.convert_ids_to_tokens(range(9)) == [*tokenizers_.CONTROL, *tokenizers_.TAGS]
