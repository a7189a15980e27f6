"""ALFWorld's engine: the same words with and without the speed-ups, and the same in every process."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest

from sdar_verl.envs.alfworld import expressions, speedups
from sdar_verl.envs.alfworld.env import AlfworldEnv
from sdar_verl.envs.alfworld.games import read_game_file
from sdar_verl.envs.alfworld.generate import generate_games
from sdar_verl.envs.alfworld.spec import GeneratorConfig
from sdar_verl.envs.base import Step, Task
from sdar_verl.envs.registry import make_env
from sdar_verl.errors import SdarError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def games(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One small game of each task type, and one in a room as full as the generator makes them."""
    root = tmp_path_factory.mktemp("games")
    small = generate_games(root / "small", "train", 6, GeneratorConfig())
    return small + generate_games(root / "full", "train", 1, GeneratorConfig(n_receptacles=16, n_distractors=6))


def as_task(game: Path) -> Task:
    return Task("alfworld", game.parent.name, "", read_game_file(game).description, {"game_file": str(game)})


def wander(env: AlfworldEnv, game: Path) -> list[Step]:
    """Random steps, some of them nonsense; then the game's own solution."""
    rng = random.Random(game.parent.name)
    seen = [env.reset(as_task(game))]
    for _ in range(15):
        seen.append(env.step(rng.choice([*seen[-1].admissible_actions, "fly to the moon"])))
    seen.append(env.reset(as_task(game)))
    return seen + [env.step(command) for command in json.loads(game.read_text())["walkthrough"]]


def test_every_word_is_the_same_as_the_stock_engines(games: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from textworld.envs.pddl import textgen

    def stock_derive(self, context=None):
        return [textgen.TerminalSymbol(eval(self.expression, {}, dict((context or self.context)["variables"])))]

    speedups.uninstall()
    with monkeypatch.context() as patch:
        patch.setattr(expressions, "install", lambda: None)
        patch.setattr(textgen.EvalSymbol, "derive", stock_derive)
        stock = [wander(AlfworldEnv(hide_actions=[], speedups=False), game) for game in games]
    assert not speedups.installed()
    env = AlfworldEnv(hide_actions=[])
    # Two rounds: the second is answered from memory.
    quick = [[wander(env, game) for game in games] for _ in range(2)]
    assert speedups.installed()
    for round_ in quick:
        for game, slow_play, quick_play in zip(games, stock, round_, strict=True):
            assert [astuple(step) for step in quick_play] == [astuple(step) for step in slow_play], game
    assert all(play[-1].success for play in stock)
    assert any(step.observation == "Nothing happens." for play in stock for step in play)


def test_a_game_file_cannot_run_python(games: list[Path], tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    code = f"__import__('pathlib').Path('{proof}').touch()"
    game = json.loads(games[0].read_text())
    hostile = tmp_path / "trial" / "game.tw-pddl"
    hostile.parent.mkdir()
    for speedup in (True, False):
        for expression in ("{r.name or r.id}", "{o.name}", "{r}"):  # in the first text, in answers, in commands
            assert expression in game["grammar"]
            hostile.write_text(json.dumps({**game, "grammar": game["grammar"].replace(expression, f"{{{code}}}")}))
            env = AlfworldEnv(speedups=speedup)
            with pytest.raises((ValueError, SdarError), match=r"more than ALFWorld's games do"):
                env.reset(Task("alfworld", "t", "", "", {"game_file": str(hostile)}))
                for command in game["walkthrough"]:
                    env.step(command)
    assert not proof.exists()


def test_speedups_can_be_taken_back() -> None:
    import fast_downward
    import fast_downward.interface
    import textworld.envs.pddl.textgen as textgen

    speedups.uninstall()
    before = (textgen._parse_and_convert, fast_downward.pddl2sas, fast_downward.interface.DOWNWARD_LIB_PATH)
    speedups.install()
    speedups.install()
    during = (textgen._parse_and_convert, fast_downward.pddl2sas, fast_downward.interface.DOWNWARD_LIB_PATH)
    assert all(a is not b for a, b in zip(before, during, strict=True))
    speedups.uninstall()
    after = (textgen._parse_and_convert, fast_downward.pddl2sas, fast_downward.interface.DOWNWARD_LIB_PATH)
    assert after == before


def test_the_planner_keeps_its_own_translation_on_request(games: list[Path]) -> None:
    import fast_downward

    game = json.loads(games[0].read_text())
    speedups.uninstall()
    planners = fast_downward.pddl2sas(game["pddl_domain"], game["pddl_problem"], optimize=True)[1]
    try:
        for planner in (True, False):
            speedups.install(planner=planner)
            translated = fast_downward.pddl2sas(game["pddl_domain"], game["pddl_problem"], optimize=True)[1]
            assert (translated == planners) is planner
            speedups.uninstall()
    finally:
        speedups.uninstall()


def test_the_first_observation_names_the_task_and_not_the_engine(games: list[Path]) -> None:
    env = AlfworldEnv()
    for game in games:
        step = env.reset(as_task(game))
        assert step.observation.startswith("You are in the middle of a room.")
        assert step.observation.endswith(f"Your task is to: {as_task(game).description}.")
        assert not step.done
        assert list(step.admissible_actions) == sorted(step.admissible_actions)


def test_hidden_actions_are_not_listed_but_still_understood(games: list[Path]) -> None:
    hidden = ["help", "inventory", "look", "examine"]
    env, full = AlfworldEnv(hide_actions=hidden), AlfworldEnv(hide_actions=[])
    env.reset(as_task(games[0]))
    everything = full.reset(as_task(games[0])).admissible_actions
    place = next(action for action in everything if action.startswith("go to"))
    shown, everything = env.step(place).admissible_actions, full.step(place).admissible_actions
    assert set(everything) - set(shown) == {a for a in everything if a.split()[0] in hidden}
    assert any(action.startswith("examine ") for action in everything)
    assert env.step("  Inventory ").observation == "You are not carrying anything."
    assert "help" not in AlfworldEnv().reset(as_task(games[0])).admissible_actions
    assert "look" in AlfworldEnv().reset(as_task(games[0])).admissible_actions


def test_only_the_winning_step_is_rewarded_and_the_episode_is_then_over(games: list[Path]) -> None:
    env = make_env("alfworld", success_reward=3)
    for game in games:
        env.reset(as_task(game))
        steps = [env.step(command) for command in json.loads(game.read_text())["walkthrough"]]
        assert [step.reward for step in steps] == [0.0] * (len(steps) - 1) + [3.0]
        assert [step.done for step in steps] == [step.success for step in steps] == [s.reward > 0 for s in steps]
        after = env.step("look")
        assert (after.done, after.success, after.reward) == (True, True, 0.0)


def test_the_words_do_not_depend_on_the_process(games: list[Path]) -> None:
    program = (
        "import sys, random\n"
        "from sdar_verl.envs.alfworld.env import AlfworldEnv\nfrom sdar_verl.envs.base import Task\n"
        "env = AlfworldEnv(); step = env.reset(Task('alfworld', '', '', '', {'game_file': sys.argv[1]}))\n"
        "rng = random.Random(0)\n"
        "for _ in range(20): print(step); step = env.step(rng.choice(step.admissible_actions))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(games[-1])],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert outputs.pop().count("Step(") == 20


def test_bad_game_files_are_named(tmp_path: Path, games: list[Path]) -> None:
    env = AlfworldEnv()
    with pytest.raises(FileNotFoundError, match=r"gone.tw-pddl .*sdar-verl prepare alfworld"):
        env.reset(Task("alfworld", "t", "", "", {"game_file": str(tmp_path / "gone.tw-pddl")}))
    with pytest.raises(ValueError, match="no game_file"):
        env.reset(Task("webshop", "t", "", ""))
    whole = json.loads(games[0].read_text())
    broken = {
        "cut.tw-pddl": games[0].read_text()[:1000],
        "keys.tw-pddl": json.dumps({"grammar": whole["grammar"]}),
        "problem.tw-pddl": json.dumps({**whole, "pddl_problem": whole["pddl_problem"].replace("(:goal", "(:gaol")}),
    }
    changed = shutil.copy(games[0], tmp_path / "changed.tw-pddl")
    task = Task("alfworld", "t", "", "", {"game_file": str(changed), "sha256": read_game_file(changed).digest})
    assert env.reset(task).admissible_actions
    changed.write_bytes(games[1].read_bytes())
    with pytest.raises(ValueError, match=r"changed.tw-pddl .* not the one that the panel was made with .*--force"):
        env.reset(task)
    for name, text in broken.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name} cannot be played"):
            env.reset(Task("alfworld", "t", "", "", {"game_file": str(tmp_path / name)}))
    with pytest.raises(RuntimeError, match="step before reset"):
        env.step("look")
    assert env.reset(as_task(games[0])).admissible_actions
