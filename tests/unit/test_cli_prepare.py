"""``sdar-verl prepare alfworld``: same options, same panels; every missing piece is named with its remedy."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest

from sdar_verl.cli import main
from sdar_verl.envs.alfworld import prepare as module
from sdar_verl.panels import read_panel

GRAMMAR = 'grammar :: """{"intro": [{"rhs": "Hi"}], "task": [{"rhs": "Your task is to: %s"}]}"""'
SPLITS = ("train", "valid_seen", "valid_unseen")


def add_game(
    root: Path,
    split: str,
    name: str,
    description: str = 'put a \\"red\\" apple in fridge.',
    task_type: str = "pick_and_place_simple",
    **game: object,
) -> Path:
    folder = root / split / name
    folder.mkdir(parents=True)
    (folder / "traj_data.json").write_text(json.dumps({"task_type": task_type}))
    content = {"grammar": GRAMMAR % description, "pddl_problem": name, "solvable": True, **game}
    (folder / "game.tw-pddl").write_text(json.dumps(content))
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A downloaded data set in small: six games to train, two in each of the others."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "download" / "json_2.1.1"
    for i in (3, 1, 5, 0, 2, 4):
        kind = ("pick_and_place_simple", "look_at_obj_in_light")[i % 2]
        add_game(root, "train", f"{kind}-Apple-None-Fridge-{i}/trial_T{i}", task_type=kind)
    for split in SPLITS[1:]:
        for i in range(2):
            add_game(root, split, f"pick_and_place_simple-Mug-None-Desk-{i}/trial_T{i}")
    return root


def prepare(*arguments: object) -> int:
    return main(["prepare", "alfworld", *map(str, arguments)])


def test_downloaded_games_become_three_sorted_panels(data: Path, tmp_path: Path, capsys) -> None:
    assert prepare("--out", tmp_path / "a", "--data", data.parent) == 0
    said = capsys.readouterr()
    train = read_panel(tmp_path / "a" / "train.parquet")
    assert [task.task_id for task in train] == sorted(task.task_id for task in train)
    assert train[0].task_id == "look_at_obj_in_light-Apple-None-Fridge-1/trial_T1"
    assert train[0].task_type == "look_at_obj_in_light"
    assert train[0].description == 'put a "red" apple in fridge'
    assert Path(train[0].data["game_file"]) == data / "train" / train[0].task_id / "game.tw-pddl"
    described = json.loads((tmp_path / "a" / "panel.json").read_text())
    assert {name: panel["tasks"] for name, panel in described["panels"].items()} == {
        "train": 6,
        "validation": 2,
        "test": 2,
    }
    assert described["panels"]["train"]["task_types"] == {"look_at_obj_in_light": 3, "pick_and_place_simple": 3}
    assert set(described["versions"]) == {"sdar-verl", "alfworld", "textworld"}
    for panel in described["panels"].values():
        assert panel["hash"][:16] in said.out
    assert "train holds 6 playable games, the published data set 3553" in said.err


def test_the_hash_depends_on_the_games_and_not_on_where_they_lie(data: Path, tmp_path: Path, monkeypatch) -> None:
    assert prepare("--out", tmp_path / "a", "--data", data) == 0
    shutil.copytree(data, tmp_path / "moved")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "moved"))
    assert prepare("--out", tmp_path / "b") == 0
    first, second = (json.loads((tmp_path / name / "panel.json").read_text())["panels"] for name in "ab")
    assert first == second
    game = next((tmp_path / "moved" / "train").rglob("game.tw-pddl"))
    game.write_text(game.read_text() + " ")
    assert prepare("--out", tmp_path / "c") == 0
    third = json.loads((tmp_path / "c" / "panel.json").read_text())["panels"]
    assert third["train"]["hash"] != first["train"]["hash"]
    assert third["test"] == first["test"]


def test_a_download_that_was_moved_is_found_where_it_lies_now(data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "a"
    assert prepare("--out", out, "--data", data) == 0
    before = json.loads((out / "panel.json").read_text())["panels"]
    moved = shutil.copytree(data, tmp_path / "moved")
    assert prepare("--out", out, "--data", moved) == 2, "both are there: it may be another data set"
    assert f"data: {data} there, {moved} asked for" in capsys.readouterr().err
    shutil.rmtree(data)
    assert prepare("--out", out, "--data", moved) == 0
    assert json.loads((out / "panel.json").read_text())["panels"] == before
    (task, *_) = read_panel(out / "train.parquet")
    assert Path(task.data["game_file"]).is_relative_to(moved)


def test_unplayable_trajectories_are_left_out_and_counted(data: Path, tmp_path: Path, capsys) -> None:
    add_game(data, "train", "pick_and_place_with_movable_recep-Pen-Mug-Desk-1/trial_T1")
    add_game(data, "train", "pick_and_place_simple-AppleSliced-None-Desk-1/trial_T1")
    add_game(data, "train", "pick_and_place_simple-Pen-None-Desk-7/trial_T1", solvable=False)
    (add_game(data, "train", "pick_and_place_simple-Pen-None-Desk-8/trial_T1") / "game.tw-pddl").unlink()
    assert prepare("--out", tmp_path / "a", "--data", data) == 0
    out = capsys.readouterr().out
    assert len(read_panel(tmp_path / "a" / "train.parquet")) == 6
    assert "2 left out: movable receptacle or sliced object" in out
    assert "1 left out: not known to be solvable" in out
    assert "1 left out: no game.tw-pddl" in out


def test_counts_choose_balanced_parts(data: Path, tmp_path: Path, capsys) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert prepare("--out", tmp_path / name, "--data", data, "--train", 2, "--seed", seed) == 0
    panels = [read_panel(tmp_path / name / "train.parquet") for name in "abc"]
    assert [task.task_type for task in panels[0]] == ["look_at_obj_in_light", "pick_and_place_simple"]
    assert panels[0] == panels[1] != panels[2]
    assert prepare("--out", tmp_path / "d", "--data", data, "--test", 3) == 2
    assert "--test 3: valid_unseen holds only 2 playable games" in capsys.readouterr().err
    assert prepare("--out", tmp_path / "d", "--data", data, "--test", 0) == 2
    assert "--test 0: ask for at least one" in capsys.readouterr().err
    assert not (tmp_path / "d" / "panel.json").exists()


def test_task_types_are_kept_in_any_order(data: Path, tmp_path: Path) -> None:
    assert prepare("--out", tmp_path / "a", "--data", data, "--task-types", "pick_and_place_simple") == 0
    assert {task.task_type for task in read_panel(tmp_path / "a" / "train.parquet")} == {"pick_and_place_simple"}
    types = ["pick_and_place_simple", "look_at_obj_in_light"]
    assert prepare("--out", tmp_path / "b", "--data", data, "--task-types", *types) == 0
    assert prepare("--out", tmp_path / "b", "--data", data, "--task-types", *types[::-1]) == 0


def test_the_second_call_does_nothing_and_other_settings_need_force(data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "a"
    assert prepare("--out", out, "--data", data) == 0
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    capsys.readouterr()
    assert prepare("--out", out, "--data", data) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert prepare("--out", out, "--data", data, "--train", 2) == 2
    error = capsys.readouterr().err
    assert "counts.train: not set there, 2 asked for" in error
    assert "--force" in error
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert prepare("--out", out, "--data", data, "--train", 2, "--force") == 0
    assert len(read_panel(out / "train.parquet")) == 2
    (out / "test.parquet").unlink()
    assert prepare("--out", out, "--data", data) == 2, "it holds panels of other settings, whole or not"
    assert prepare("--out", out, "--data", data, "--train", 2) == 0
    assert len(read_panel(out / "test.parquet")) == 2
    (out / "test.parquet").write_bytes((out / "test.parquet").read_bytes()[:100])
    assert prepare("--out", out, "--data", data, "--train", 2) == 2
    assert "test.parquet is not the panel that panel.json describes; make the panels again with --force" in (
        capsys.readouterr().err
    )
    assert prepare("--out", out, "--data", data, "--train", 2, "--force") == 0


@pytest.mark.parametrize("content", ['{"panels": {}}', '{"panels": {}, "settings": {}}', "[]", "{"])
def test_a_damaged_description_is_named_with_the_remedy(data: Path, tmp_path: Path, content: str, capsys) -> None:
    (tmp_path / "panel.json").write_text(content)
    assert prepare("--out", tmp_path, "--data", data) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'panel.json'} is damaged" in said and "--force" in said


def test_one_call_at_a_time_works_in_a_folder(data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / ".prepare.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert prepare("--out", tmp_path / "a", "--data", data) == 2
    assert "another `sdar-verl prepare` is at work there" in capsys.readouterr().err
    assert prepare("--out", tmp_path / "a", "--data", data) == 0, "a lock that nobody holds is none"
    assert prepare("--out", tmp_path / "b", "--data", data, "--train", 99) == 2
    assert not (tmp_path / "b").exists()


def test_an_empty_folder_is_no_folder(capsys) -> None:
    for words in (["--out", ""], ["--out", " "], ["--out="]):
        with pytest.raises(SystemExit):
            main(["prepare", "search", *words])
        assert "argument --out: a path is needed, and this is empty" in capsys.readouterr().err


def break_games(data: Path) -> None:
    for game in list(data.rglob("game.tw-pddl"))[1:]:
        game.unlink()


def cut_game(data: Path) -> None:
    game = next((data / "train").rglob("game.tw-pddl"))
    game.write_text(game.read_text()[:60])


def foreign_game(data: Path) -> None:
    next((data / "train").rglob("game.tw-pddl")).write_text('{"grammar": "", "solvable": true}')


def cut_trajectory(data: Path) -> None:
    next((data / "train").rglob("traj_data.json")).write_text('{"task_')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: shutil.rmtree(data / "valid_seen"), "lacks valid_seen, so the download is not complete"),
        (lambda data: shutil.rmtree(data), "holds neither json_2.1.1/ nor train/"),
        (lambda data: shutil.rmtree(data.parent), "is not a folder"),
        (break_games, "have no game.tw-pddl, so the download stopped half-way"),
        (lambda data: [shutil.rmtree(d) for d in (data / "train").iterdir()], "train holds no playable game (no traj"),
        (cut_game, "is not a whole ALFWorld game"),
        (foreign_game, "has no line 'Your task is to: ...'"),
        (cut_trajectory, "traj_data.json is damaged"),
    ],
)
def test_incomplete_data_is_named_with_the_remedy(data: Path, tmp_path: Path, damage, message: str, capsys) -> None:
    damage(data)
    assert prepare("--out", tmp_path / "a", "--data", data.parent) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "download" in error
    assert not (tmp_path / "a").exists()


def test_no_data_at_all(data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    assert prepare("--out", tmp_path / "a") == 2
    error = capsys.readouterr().err
    assert "ALFWORLD_DATA is not set" in error
    assert "--generate" in error
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nowhere"))
    assert prepare("--out", tmp_path / "a") == 2
    assert "ALFWORLD_DATA=" in capsys.readouterr().err
    default = tmp_path / "home" / ".cache" / "alfworld"
    shutil.copytree(data.parent, default)
    monkeypatch.delenv("ALFWORLD_DATA")
    assert prepare("--out", tmp_path / "a") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--receptacles", 5], "--receptacles only has an effect with --generate"),
        (["--processes", 2], "--processes only has an effect with --generate"),
        (["--household-seed", 1], "--household-seed only has an effect with --generate"),
        (["--generate", "--data", "x"], "--data x has no effect with --generate"),
        (["--generate", "--receptacles", 99], "n_receptacles = 99: choose 4 to 16"),
        (["--generate", "--train", 0], "--train 0: ask for at least one"),
    ],
)
def test_options_without_effect_or_sense(data: Path, tmp_path: Path, arguments, message: str, capsys) -> None:
    assert prepare("--out", tmp_path / "a", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_generated_games_take_the_same_path(data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("alfworld")
    out, counts = tmp_path / "a", ("--train", 2, "--validation", 1, "--test", 1)
    assert prepare("--out", out, "--generate", *counts, "--processes", 1) == 0
    described = json.loads((out / "panel.json").read_text())
    assert described["settings"]["generator"]["n_receptacles"] == 7
    assert prepare("--out", tmp_path / "b", "--data", out / "games") == 0
    assert json.loads((tmp_path / "b" / "panel.json").read_text())["panels"] == described["panels"]
    capsys.readouterr()
    assert prepare("--out", out, "--generate", *counts) == 0
    assert "nothing to do" in capsys.readouterr().out

    # An interrupted call leaves games without panel.json: the same call goes on, other settings need --force.
    (out / "panel.json").unlink()
    assert prepare("--out", out, "--generate", *counts) == 0
    assert json.loads((out / "panel.json").read_text()) == described
    (out / "panel.json").unlink()
    (out / "mine.txt").write_text("keep")
    other = ("--train", 1, "--validation", 1, "--test", 1, "--distractors", 0, "--processes", 1)
    assert prepare("--out", out, "--generate", *other) == 2
    assert "another configuration" in capsys.readouterr().err
    assert prepare("--out", out, "--generate", *other, "--force") == 0
    assert len(list((out / "games").rglob("game.tw-pddl"))) == 3
    assert (out / "mine.txt").read_text() == "keep"

    # What is to be replaced stays until the new is whole; a folder that was moved is put right by the same call.
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert prepare("--out", out, "--generate", *counts, "--processes", 0, "--force") == 2
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_panels", lambda *_: pytest.fail("not reached"))
        patch.setattr(module, "generate_games", lambda *_, **__: (_ for _ in ()).throw(ValueError("no more")))
        assert prepare("--out", out, "--generate", *counts, "--force") == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # Killed between the new names: the same call goes on. What leads elsewhere by a link stays there.
    (out / "games").rename(elsewhere := tmp_path / "elsewhere")
    (out / "games").symlink_to(elsewhere)
    renamed, rename = [], Path.rename

    def rename_twice(path: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) == 4:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_twice)
        assert prepare("--out", out, "--generate", *counts, "--force") == 130
    assert prepare("--out", out, "--generate", *other) == 2
    assert prepare("--out", out, "--generate", *counts, "--force") == 0
    assert (out / "games").is_symlink() and len(list(elsewhere.rglob("game.tw-pddl"))) == 4
    unfinished = tmp_path / ".elsewhere.new"
    assert not unfinished.exists()
    (unfinished / "train").mkdir(parents=True)
    (unfinished / "train" / "generator.json").write_text('{"se')
    (unfinished / ".nfs1").touch()
    assert prepare("--out", out, "--generate", *other, "--force") == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"a", "elsewhere"} and not unfinished.exists()
    assert {path.name for path in elsewhere.iterdir()} == {"train", "valid_seen", "valid_unseen"}
    (out / "games").unlink()
    elsewhere.rename(out / "games")
    assert prepare("--out", out, "--generate", *other) == 0, "its games are where they are said to be"
    out.rename(moved := tmp_path / "moved")
    games = {path: path.stat().st_mtime_ns for path in moved.rglob("game.tw-pddl")}
    assert prepare("--out", moved, "--generate", *other) == 0
    assert {path: path.stat().st_mtime_ns for path in moved.rglob("game.tw-pddl")} == games
    for task in read_panel(moved / "train.parquet"):
        assert Path(task.data["game_file"]).is_relative_to(moved) and Path(task.data["game_file"]).is_file()
    shutil.rmtree(moved / "games" / "train")
    assert prepare("--out", moved, "--generate", *other) == 0
    assert {path: path.is_file() for path in games} == dict.fromkeys(games, True)
    (moved / "games" / "train" / "generator.json").write_text("{")
    (moved / "panel.json").unlink()
    capsys.readouterr()
    assert prepare("--out", moved, "--generate", *other) == 2
    assert "generator.json is damaged" in capsys.readouterr().err
