"""Game generation: the same games everywhere, all six task types, won on the stock engine, in ALFWorld's layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sdar_verl.envs.alfworld import speedups
from sdar_verl.envs.alfworld.generate import UnsolvableGameError, generate_games, solve, write_game
from sdar_verl.envs.alfworld.sampling import sample_spec
from sdar_verl.envs.alfworld.spec import (
    LAMP,
    PROCESSES,
    ROOMS,
    SPLITS,
    TASK_TYPES,
    GameSpec,
    GeneratorConfig,
    fits,
    held_out,
    process_of,
    usual_places,
)
from sdar_verl.skills.bank import SkillBank

pytest.importorskip("alfworld")


def place_of(spec: GameSpec, object_type: str) -> str:
    """Receptacle type that the first object of a type lies in."""
    where = next(o.receptacle_id for o in spec.objects if o.type == object_type)
    return next(r.type for r in spec.receptacles if r.receptacle_id == where)


@pytest.fixture(scope="module")
def games(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """One game per task type on held-out floor plans, made by two processes."""
    root = tmp_path_factory.mktemp("games")
    return root, generate_games(root, "valid_unseen", len(TASK_TYPES), GeneratorConfig(seed=3), processes=2)


def test_specs_depend_on_nothing_but_config_split_and_index() -> None:
    program = (
        "import json; from dataclasses import asdict; from sdar_verl.envs.alfworld.sampling import sample_spec;"
        "from sdar_verl.envs.alfworld.spec import GeneratorConfig;"
        "print(json.dumps([asdict(sample_spec(GeneratorConfig(seed=5), 'train', i)) for i in reversed(range(12))]))"
    )
    here = [asdict(sample_spec(GeneratorConfig(seed=5), "train", i)) for i in reversed(range(12))]
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        there = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert json.loads(there.stdout) == json.loads(json.dumps(here))


def test_seed_split_and_index_each_change_the_game() -> None:
    base = sample_spec(GeneratorConfig(), "train", 0)
    for other in (
        sample_spec(GeneratorConfig(seed=1), "train", 0),
        sample_spec(GeneratorConfig(), "valid_seen", 0),
        sample_spec(GeneratorConfig(), "train", len(TASK_TYPES)),
    ):
        assert {r.receptacle_id for r in other.receptacles} != {r.receptacle_id for r in base.receptacles} or (
            other.objects != base.objects
        )


@pytest.mark.parametrize("split", SPLITS)
def test_specs_are_what_the_configuration_says(split: str) -> None:
    config = GeneratorConfig(n_receptacles=6, n_distractors=2)
    specs = [sample_spec(config, split, index) for index in range(300)]
    places = usual_places()
    assert [s.task_type for s in specs[:6]] == list(TASK_TYPES)
    for spec in specs:
        assert held_out(spec.scene) == (split == "valid_unseen")
        assert spec.scene in ROOMS[spec.room].scenes
        assert len(spec.receptacles) <= 6
        types = {r.type for r in spec.receptacles}
        targets = [o for o in spec.objects if o.type == spec.target]
        assert len(targets) == (2 if spec.task_type == "pick_two_obj_and_place" else 1)
        assert spec.usual_place == places[spec.target] and spec.usual_place in types
        if spec.task_type == "look_at_obj_in_light":
            assert spec.toggle == LAMP and spec.destination == "" and places[LAMP] in types
        else:
            assert spec.destination in types and fits(spec.destination, spec.target)
            assert spec.destination not in (place_of(spec, spec.target), spec.usual_place)
        if process := process_of(spec.task_type):
            assert PROCESSES[process][0] in types
        for placed in spec.objects:
            assert fits(next(r.type for r in spec.receptacles if r.receptacle_id == placed.receptacle_id), placed.type)
        assert len({o.object_id for o in spec.objects}) == len(spec.objects)
    assert max(len(s.receptacles) for s in specs) == 6


@pytest.mark.parametrize("p_home", [0.0, 0.85, 1.0])
def test_objects_follow_their_usual_place_with_p_home(p_home: float) -> None:
    specs = [sample_spec(GeneratorConfig(p_home=p_home), "train", index) for index in range(1200)]
    share = sum(place_of(s, s.target) == s.usual_place for s in specs) / len(specs)
    # three standard errors of 1,200 draws
    assert abs(share - p_home) <= 3 * (p_home * (1 - p_home) / len(specs)) ** 0.5


def test_generated_games_lie_as_alfworld_expects_and_its_collector_takes_them(games: tuple[Path, list[Path]]) -> None:
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

    root, paths = games
    for path in paths:
        trajectory = json.loads((path.parent / "traj_data.json").read_text())
        params = trajectory["pddl_params"]
        goal = params["parent_target"] or params["toggle_target"]
        scene = trajectory["scene"]["scene_num"]
        assert path.name == "game.tw-pddl" and (path.parent / "initial_state.pddl").is_file()
        assert path.parents[2] == root / "valid_unseen" and path.parent.name.startswith("trial_")
        assert path.parents[1].name == f"{trajectory['task_type']}-{params['object_target']}-None-{goal}-{scene}"
        assert trajectory["sdar"]["usual_place"] == usual_places()[params["object_target"]]
        assert params["object_sliced"] is False and params["mrecep_target"] == ""
    config = {
        "env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]},
        "dataset": {"eval_ood_data_path": str(root / "valid_unseen"), "num_eval_games": 0},
    }
    collected = AlfredTWEnv(config, train_eval="eval_out_of_distribution").game_files
    assert sorted(collected) == sorted(map(str, paths))


def test_all_six_types_are_won_by_their_walkthrough_on_the_stock_engine(games: tuple[Path, list[Path]]) -> None:
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
    from textworld.envs import PddlEnv

    speedups.uninstall()  # the engine exactly as its packages ship it
    types = set()
    for path in games[1]:
        engine = AlfredInfos(AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True)), shuffle=False))
        engine.load(str(path))
        state = engine.reset()
        assert not state["won"]
        trajectory = json.loads((path.parent / "traj_data.json").read_text())
        description = trajectory["turk_annotations"]["anns"][0]["task_desc"]
        assert f"Your task is to: {description}." in state.feedback
        for command in json.loads(path.read_text())["walkthrough"]:
            assert not state["won"]
            state, _, _ = engine.step(command)
        assert state["won"]
        types.add(trajectory["task_type"])
    assert types == set(TASK_TYPES)


def test_generation_goes_on_where_it_stopped_and_does_not_depend_on_processes(
    games: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    config = GeneratorConfig(seed=3)
    first = generate_games(tmp_path, "valid_unseen", 1, config)
    written = first[0].stat().st_mtime_ns
    steps: list[tuple[int, int]] = []
    both = generate_games(tmp_path, "valid_unseen", 2, config, progress=lambda done, count: steps.append((done, count)))
    assert both[0] == first[0] and first[0].stat().st_mtime_ns == written
    assert steps == [(2, 2)]
    for mine, other in zip(both, games[1], strict=False):
        assert json.loads(mine.read_text())["pddl_problem"] == json.loads(other.read_text())["pddl_problem"]


def test_a_folder_holds_games_of_one_configuration(games: tuple[Path, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another configuration"):
        generate_games(games[0], "valid_unseen", 1, GeneratorConfig(seed=4))
    (tmp_path / "train" / "pick_and_place_simple-Apple-None-Fridge-1").mkdir(parents=True)
    with pytest.raises(ValueError, match="something else"):
        generate_games(tmp_path, "train", 1, GeneratorConfig())


def test_an_unsolvable_game_is_never_written(tmp_path: Path) -> None:
    spec = sample_spec(GeneratorConfig(task_types=("pick_and_place_simple",)), "train", 0)
    without_target = replace(spec, objects=tuple(o for o in spec.objects if o.type != spec.target))
    without_target = replace(without_target, target="Book" if spec.room == "kitchen" else "Apple")
    with pytest.raises(UnsolvableGameError, match="pick_and_place_simple"):
        write_game(without_target, tmp_path)
    assert not list(tmp_path.rglob("game.tw-pddl"))
    assert solve(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_types": ()}, "task_types"),
        ({"task_types": ("pick_and_eat",)}, "pick_and_eat"),
        ({"task_types": ("pick_two_obj_and_place",) * 2}, "once"),
        ({"rooms": ("garage",)}, "garage"),
        ({"rooms": ("kitchen",)}, "look_at_obj_in_light needs one of bedroom"),
        ({"n_receptacles": 3}, "n_receptacles = 3"),
        ({"n_distractors": -1}, "n_distractors = -1"),
        ({"p_home": 1.5}, "p_home = 1.5"),
        ({"scenes": (1, 999)}, "999"),
    ],
)
def test_bad_configuration_names_field_and_value(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(**options)  # type: ignore[arg-type]


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split = 'test'"):
        sample_spec(GeneratorConfig(), "test", 0)
    with pytest.raises(ValueError, match="index = -1"):
        sample_spec(GeneratorConfig(), "train", -1)
    with pytest.raises(ValueError, match="count = 0"):
        generate_games(tmp_path, "train", 0, GeneratorConfig())
    with pytest.raises(ValueError, match="processes = 0"):
        generate_games(tmp_path, "train", 1, GeneratorConfig(), processes=0)
    with pytest.raises(ValueError, match="no look_at_obj_in_light game"):
        # floor plan 5 is a held-out kitchen: no training scene is left
        sample_spec(GeneratorConfig(scenes=(5,)), "train", 1)


def test_the_household_bank_tells_the_default_household() -> None:
    bank = SkillBank.load("alfworld_household")
    told = {tuple(skill.text.split()[:3]) for skill in bank if not skill.task_types}
    assert told == {(o.lower(), "in", r.lower()) for o, r in usual_places().items()}
    assert {t for skill in bank for t in skill.task_types} == set(TASK_TYPES)
