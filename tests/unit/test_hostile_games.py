"""ALFWorld's files from elsewhere, without the engine: read or refused with the file's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from sdar_verl.envs.alfworld.dataset import DatasetError, read_games
from sdar_verl.envs.alfworld.games import GameFileError, read_game_file, read_walkthrough
from tests.support.fuzzing import damaged, mutations, quick

RULES = {"task": [{"rhs": "Your task is to: put a mug on desk.", "lhs": "task"}]}
GAME = {
    "pddl_domain": "(define)",
    "grammar": json.dumps(RULES),
    "pddl_problem": "(define)",
    "solvable": True,
    "walkthrough": ["go to desk 1"],
}


def game_file(folder: Path, content: bytes, trajectory: Any = None) -> Path:
    path = folder / "train" / "pick-Mug-1" / "trial_1" / "game.tw-pddl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    known = {"task_type": "pick_and_place_simple"} if trajectory is None else trajectory
    path.with_name("traj_data.json").write_text(json.dumps(known))
    return path


def read_or_refused(folder: Path, content: bytes, trajectory: Any = None) -> None:
    path = game_file(folder, content, trajectory)
    for read in (read_game_file, read_walkthrough):
        try:
            read(path)
        except GameFileError as error:
            assert "game.tw-pddl" in str(error) and len(str(error)) < 1500
    try:
        for task in read_games(folder, "train").tasks:
            task.description.encode()
    except DatasetError as error:
        assert str(folder) in str(error)


def test_a_sound_game_is_read(tmp_path: Path) -> None:
    path = game_file(tmp_path, json.dumps(GAME).encode())
    assert read_game_file(path).description == "put a mug on desk"
    assert [task.task_type for task in read_games(tmp_path, "train").tasks] == ["pick_and_place_simple"]


@quick(60)
@given(game=mutations(GAME))
def test_a_game_with_wrong_parts_is_read_or_refused(tmp_path: Path, game: Any) -> None:
    read_or_refused(tmp_path, json.dumps(game).encode())


@quick(60)
@given(content=damaged(json.dumps(GAME).encode()))
def test_a_damaged_game_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    read_or_refused(tmp_path, content)


@quick(40)
@given(trajectory=mutations({"task_type": "pick_and_place_simple"}))
def test_a_trajectory_with_wrong_parts_is_read_or_refused(tmp_path: Path, trajectory: Any) -> None:
    read_or_refused(tmp_path, json.dumps(GAME).encode(), trajectory)


def test_a_task_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = game_file(tmp_path, json.dumps({**GAME, "grammar": r'{"rhs": "Your task is to: put \q on desk."}'}).encode())
    with pytest.raises(GameFileError, match=r"game\.tw-pddl: its task .* is no JSON text"):
        read_game_file(path)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, json.dumps({**GAME, "grammar": 3, "walkthrough": 3}).encode(), b"\xff"]
)
def test_hostile_games_are_refused(tmp_path: Path, content: bytes) -> None:
    path = game_file(tmp_path, content)
    for read in (read_game_file, read_walkthrough):
        with pytest.raises(GameFileError, match=r"game\.tw-pddl is not a whole ALFWorld game"):
            read(path)
    with pytest.raises(DatasetError):
        read_games(tmp_path, "train")
